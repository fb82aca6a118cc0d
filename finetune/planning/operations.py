"""A model, how it is trained, sizes of a row -> every operation of its forward, as sizes. No torch.

The forward of IDEFICS is written down once more (see `tape`); what an operation keeps for its backward is said where it
stands. `scripts/benchmarks/check_plan.py` holds it against what torch's allocator counts.

Letters: T tokens of a row, K supervised ones, N images, P patches of an image (and its class token), L latents.
"""

from collections.abc import Callable

from finetune.planning.graph import FP32, Operation, Tape, Tensor
from finetune.planning.setup import RowSize, Setup
from modeling.towers import QUANTIZED_TOWERS

HEAD_ROWS, ROWS = 128, 16
"""Rows of logits that exist at once, and whose losses are computed at once (modeling/forward.py)."""

NF4_GROUP = 64
"""Weights that share a scale; matrices whose rows are no whole groups are not quantised."""

INT64 = 8
"""Bytes."""


def record(setup: Setup, row: RowSize) -> list[Operation]:
    """Every operation from pixels and ids to the loss of one row."""
    return _Forward(setup).loss(row).operations


class _Forward:
    """The stock forward over one packed row, as modeling/attention.py and modeling/forward.py run it."""

    def __init__(self, setup: Setup):
        self.setup, self.config, self.tape = setup, setup.config, Tape()
        self.held: list[Tensor] = []
        """Kept by a variable, or by autocast, until the forward is over."""

    def loss(self, row: RowSize) -> Tape:
        with self.tape.of("batch"):
            self._masks(row)
        images = self._images(row.images)
        with self.tape.of("decoder"):
            hidden = self._embedded(row.tokens)
        self.held += [hidden, images]
        interval = self.config["cross_layer_interval"]
        for layer in range(self.config["num_hidden_layers"]):
            brief = layer < self.setup.checkpointing
            if layer % interval == 0:
                with self.tape.of("cross_attention"):
                    hidden = self._layer(brief, lambda x: self._cross_layer(x, images), hidden, images)
            with self.tape.of("decoder"):
                hidden = self._layer(brief, self._decoder_layer, hidden)
        with self.tape.of("decoder"):
            hidden = self._rms_norm(hidden, "decoder")
        self.tape.touch(*self.held)
        with self.tape.of("head"):
            self._head(hidden, row.supervised)
        return self.tape

    def _masks(self, row: RowSize) -> None:
        """Which latents a token sees: as integers, then as a mask in the model's type."""
        latents = self.config["perceiver_config"]["resampler_n_latents"]
        for item in (INT64, self.setup.item):
            self.held.append(self.tape.run((), self.tape.new(row.tokens, latents, item)))

    # Vision tower and resampler

    def _images(self, images: int) -> Tensor:
        """[N * L, E]: what cross-attention reads. With a trained tower, a row without images has a blank one."""
        if self.setup.mode("vision") != "frozen" or self.setup.mode("resampler") != "frozen":
            images = max(images, 1)
        if self.setup.cached:
            return self._cached(images)
        with self.tape.of("vision"):
            patches = self._vision(images)
        with self.tape.of("resampler"):
            return self._resampled(patches, images)

    def _cached(self, images: int) -> Tensor:
        """Those of the batch itself: joining its images to [N * L, E] copies nothing."""
        latents, width = (
            self.config["perceiver_config"]["resampler_n_latents"],
            self.config["vision_config"]["embed_dim"],
        )
        with self.tape.of("batch"):
            return self.tape.run((), self.tape.new(images * latents, width, self.setup.item))

    def _vision(self, images: int) -> Tensor:
        vision, setup, tape = self.config["vision_config"], self.setup, self.tape
        grid, width = (vision["image_size"] // vision["patch_size"]) ** 2, vision["embed_dim"]
        item = setup.item_of("vision")
        pixels = tape.new(images, 3 * vision["image_size"] ** 2, setup.item)
        if setup.item < FP32:
            self.held.append(tape.run((), pixels))
        convolution = width * 3 * vision["patch_size"] ** 2 * FP32 if setup.is_full("vision") else 0
        patches = tape.run((), tape.new(images * grid, width, item), saves=(pixels,), gradients=convolution)
        joined = tape.run((patches,), tape.new(images * (grid + 1), width, item))
        placed = tape.run(
            (joined,), tape.new(joined.rows, width, item), gradients=self._if_full("vision", (grid + 2) * width)
        )
        hidden = self._layer_norm(placed, "vision")
        for _ in range(vision["num_hidden_layers"]):
            hidden = self._layer(self.setup.checkpointing > 0, self._vision_layer, hidden)
        return hidden

    def _vision_layer(self, hidden: Tensor) -> Tensor:
        vision, tape = self.config["vision_config"], self.tape
        heads, width = vision["num_attention_heads"], vision["embed_dim"]
        normed = self._layer_norm(hidden, "vision")
        query, key, value = (self._linear(normed, width, "vision", bias=True) for _ in range(3))
        attended = self._attention(query, key, value, heads)
        hidden = tape.add(hidden, self._linear(attended, width, "vision", bias=True))
        inner = self._linear(self._layer_norm(hidden, "vision"), vision["intermediate_size"], "vision", bias=True)
        active = tape.like(inner, saves=(inner,))
        return tape.add(hidden, self._linear(active, width, "vision", bias=True))

    def _resampled(self, patches: Tensor, images: int) -> Tensor:
        resampler, tape = self.config["perceiver_config"], self.tape
        count, width, item = resampler["resampler_n_latents"], patches.width, self.setup.item_of("resampler")
        gradients = self._if_full("resampler", count * width)
        latents = tape.run((), tape.new(images * count, width, item), gradients=gradients)
        for _ in range(resampler["resampler_depth"]):
            latents = tape.add(latents, self._resampler_attention(patches, latents, images))
            inner = self._linear(self._layer_norm(latents, "resampler"), 4 * width, "resampler")
            active = tape.new(inner.rows, inner.width, inner.item)
            tape.run((inner,), active, saves=(active,))
            latents = tape.add(latents, self._linear(active, width, "resampler"))
        return self._layer_norm(latents, "resampler")

    def _resampler_attention(self, patches: Tensor, latents: Tensor, images: int) -> Tensor:
        resampler, tape = self.config["perceiver_config"], self.tape
        heads = resampler["resampler_n_heads"]
        width = heads * resampler["resampler_head_dim"]
        context = self._layer_norm(patches, "resampler")
        normed = self._layer_norm(latents, "resampler")
        query = self._linear(normed, width, "resampler")
        both = [self._joined(context, normed) for _ in range(2)]
        key, value = (self._linear(one, width, "resampler") for one in both)
        if resampler["qk_layer_norms_perceiver"]:
            query, key = self._layer_norm(query, "resampler", heads), self._layer_norm(key, "resampler", heads)
        query, value = tape.like(query), tape.like(value)
        columns = both[0].rows // max(images, 1)
        scores = tape.new(latents.rows * heads, columns, query.item)
        tape.run((query, key), scores, saves=(query, key))
        shifted = tape.like(scores, hands_on=True)
        shares = tape.new(scores.rows, columns, scores.item)
        tape.run((shifted,), shares, saves=(shares,))
        read = tape.run((shares, value), tape.new(latents.rows, width, value.item), saves=(shares, value))
        return self._linear(tape.like(read, hands_on=True), latents.width, "resampler")

    def _joined(self, context: Tensor, latents: Tensor) -> Tensor:
        output = self.tape.new(context.rows + latents.rows, context.width, context.item)
        return self.tape.run((context, latents), output, hands_on=True)

    # Decoder and cross-attention

    def _embedded(self, tokens: int) -> Tensor:
        config, tape, hidden = self.config, self.tape, self.config["hidden_size"]
        rows = self._if_full("embeddings_and_head", config["vocab_size"] * hidden)
        added = self._if_full("added_tokens", config["additional_vocab_size"] * hidden)
        output = tape.new(tokens, hidden, self.setup.item_of("embeddings_and_head"))
        tape.run((), output, gradients=rows + added, scratch=output.nbytes)
        return output

    def _decoder_layer(self, hidden: Tensor) -> Tensor:
        width, heads, tape = hidden.width, self.config["num_attention_heads"], self.tape
        normed = self._rms_norm(hidden, "decoder")
        query, key, value = (self._linear(normed, width, "decoder") for _ in range(3))
        turns = [tape.new(hidden.rows, width // heads, value.item) for _ in ("cosine", "sine")]
        query, key = (tape.run((one,), tape.new(one.rows, width, one.item), saves=turns) for one in (query, key))
        attended = self._packed_attention(query, key, value, heads)
        hidden = tape.add(hidden, self._linear(attended, width, "decoder"))
        return tape.add(hidden, self._mlp(self._rms_norm(hidden, "decoder"), "decoder"))

    def _cross_layer(self, hidden: Tensor, images: Tensor) -> Tensor:
        width, heads, tower = hidden.width, self.config["num_attention_heads"], "cross_attention"
        query = self._linear(self._rms_norm(hidden, tower), width, tower)
        key, value = self._linear(images, width, tower), self._linear(images, width, tower)
        if self.config["qk_layer_norms"]:
            query, key = self._rms_norm(query, tower, heads), self._rms_norm(key, tower, heads)
        attended = self._packed_attention(query, key, value, heads)
        seen = self.tape.like(self._linear(attended, width, tower))  # zero where a token sees no image
        hidden = self.tape.add(hidden, self._gated(seen))
        return self.tape.add(hidden, self._gated(self._mlp(self._rms_norm(hidden, tower), tower)))

    def _gated(self, tensor: Tensor) -> Tensor:
        trained = self.setup.is_full("gates")
        gate = 1 if self.config["alpha_type"] == "float" else tensor.width
        output = self.tape.new(tensor.rows, tensor.width, tensor.item)
        return self.tape.run(
            (tensor,), output, saves=(tensor,) if trained else (), gradients=self._if_full("gates", gate)
        )

    def _mlp(self, hidden: Tensor, tower: str) -> Tensor:
        inner = self.config["intermediate_size"]
        gate, up = self._linear(hidden, inner, tower), self._linear(hidden, inner, tower)
        product = self.tape.new(gate.rows, inner, gate.item)
        self.tape.run((gate, up), product, saves=(gate, up))
        return self._linear(product, hidden.width, tower)

    def _packed_attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Each sequence's (or image's) result is joined to a row; all parts' gradients live when they are joined."""
        joining = query.nbytes + key.nbytes + value.nbytes + max(query.nbytes, key.nbytes)
        return self.tape.like(self._attention(query, key, value, heads, scratch=joining), hands_on=True)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int, *, scratch: int = 0) -> Tensor:
        """Fused: no scores are kept, but a logarithm for each query and head."""
        output = self.tape.new(query.rows, query.width, query.item)
        sums = self.tape.new(query.rows, heads, FP32)
        saves, scratch = (query, key, value, output, sums), max(scratch, 2 * query.nbytes)
        return self.tape.run((query, key, value), output, saves=saves, scratch=scratch)

    # Head and loss

    def _head(self, hidden: Tensor, supervised: int) -> None:
        """Its gradients are made in the forward, a few rows of logits at a time, and wait for the backward."""
        config, tape, setup = self.config, self.tape, self.setup
        chosen = tape.run((hidden,), tape.new(supervised, hidden.width, hidden.item))
        vocabulary, added = config["vocab_size"], config["additional_vocab_size"]
        if setup.divided:
            self._head_at_once(chosen, vocabulary, added)
            return
        waiting = [tape.new(supervised, hidden.width, hidden.item)]
        for tower, rows in (("embeddings_and_head", vocabulary), ("added_tokens", added)):
            if setup.is_full(tower):
                waiting.append(tape.new(rows, hidden.width, FP32))
        if setup.autocast and setup.is_full("embeddings_and_head"):
            self._weight_in_bf16(hidden.width, vocabulary)
        item, width = setup.item if setup.autocast else hidden.item, vocabulary + added
        # A CPU makes a copy in fp32 of what it adds to, or writes to, fp32.
        copied = FP32 if item < FP32 and not setup.gpu else 0
        # Logits, their logarithms in fp32, and their gradient where it is not in fp32 itself.
        some = min(supervised, HEAD_ROWS) * width * (item + copied + FP32 + (item if item < FP32 else 0))
        if setup.is_full("embeddings_and_head"):  # those of a few rows, before they are added to the others'
            some += vocabulary * hidden.width * (item + copied)
        gradients = sum(one.nbytes for one in waiting[1:])
        tape.run((chosen,), tape.new(1, 1, FP32), saves=waiting, gradients=gradients, scratch=some)

    def _head_at_once(self, chosen: Tensor, vocabulary: int, added: int) -> None:
        """All logits exist, with their gradient: a head that is divided runs once. Those of both parts are joined."""
        tape, width = self.tape, vocabulary + added
        gradients = self._if_full("embeddings_and_head", vocabulary * chosen.width)
        gradients += self._if_full("added_tokens", added * chosen.width)
        logits = tape.new(chosen.rows, width, self.setup.item)
        tape.run((chosen,), logits, saves=(chosen,) if gradients else (), gradients=gradients, scratch=logits.nbytes)
        some = 2 * FP32 * min(chosen.rows, ROWS) * width
        tape.run((logits,), tape.new(1, 1, FP32), saves=(logits,), scratch=some)

    # What all of them are made of

    def _layer(self, brief: bool, layer: Callable[[Tensor], Tensor], hidden: Tensor, *others: Tensor) -> Tensor:
        """`brief`: of which only the inputs are kept."""
        return self.tape.checkpoint(layer, hidden, *others) if brief else layer(hidden)

    def _if_full(self, tower: str, parameters: int) -> int:
        """Bytes of the gradients of these parameters."""
        return FP32 * parameters if self.setup.is_full(tower) else 0

    def _linear(self, hidden: Tensor, width: int, tower: str, *, bias: bool = False) -> Tensor:
        """Keeps its input where its weight is trained; 4-bit weights are there in full while they are used."""
        setup, tape = self.setup, self.tape
        parameters = hidden.width * width
        source = tape.cast(hidden, setup.item) if setup.autocast else hidden
        kept = [source] if setup.is_full(tower) else []
        if setup.autocast and setup.item_of(tower) == FP32:
            kept.append(self._weight_in_bf16(hidden.width, width))
        in_4_bits = setup.quantize and tower in QUANTIZED_TOWERS and hidden.width % NF4_GROUP == 0
        output = tape.run(
            (source,),
            tape.new(hidden.rows, width, source.item),
            saves=kept,
            gradients=self._if_full(tower, parameters + width * bias),
            scratch=parameters * source.item * in_4_bits,
        )
        return self._with_lora(hidden, output) if setup.mode(tower) == "lora" else output

    def _weight_in_bf16(self, rows: int, width: int) -> Tensor:
        """Autocast's copy, which it reuses until the forward is over."""
        copy = self.tape.run((), self.tape.new(rows, width, self.setup.item))
        self.held.append(copy)
        return copy

    def _with_lora(self, hidden: Tensor, output: Tensor) -> Tensor:
        """The factors are fp32, and so is their input, which every adapted layer keeps for itself unless it was."""
        setup, tape = self.setup, self.tape
        source = self._dropped(tape.cast(hidden, FP32))
        if setup.autocast:
            source = tape.cast(source, setup.item)
        low = tape.new(hidden.rows, setup.rank, source.item)
        tape.run((source,), low, saves=(source,), gradients=FP32 * setup.rank * hidden.width)
        high = tape.new(hidden.rows, output.width, source.item)
        gradients = FP32 * setup.rank * output.width
        if setup.item == FP32 and not setup.quantize:  # one operation, modeling/lora.py
            return tape.run((output, low), high, saves=(low,), gradients=gradients, hands_on=True)
        tape.run((low,), high, saves=(low,), gradients=gradients)
        return tape.cast(tape.add(output, tape.like(high)), output.item)

    def _dropped(self, hidden: Tensor) -> Tensor:
        """Dropout keeps its mask: a byte a number on a GPU, the numbers' own type on a CPU."""
        if not self.setup.dropout:
            return hidden
        mask = self.tape.new(hidden.rows, hidden.width, 1 if self.setup.gpu else hidden.item)
        return self.tape.like(hidden, saves=(mask,))

    def _rms_norm(self, hidden: Tensor, tower: str, heads: int = 1) -> Tensor:
        """In fp32, whatever its input: keeps the input, and a root for each vector."""
        tape, full = self.tape, self.setup.is_full(tower)
        output = tape.new(hidden.rows, hidden.width, self.setup.item_of(tower))
        return tape.run(
            (hidden,),
            output,
            saves=[hidden, tape.new(hidden.rows, heads, FP32)],
            gradients=self._if_full(tower, hidden.width // heads),
            scratch=(full + 3 * (hidden.item < FP32)) * FP32 * hidden.rows * hidden.width,
        )

    def _layer_norm(self, hidden: Tensor, tower: str, heads: int = 1) -> Tensor:
        """Keeps its input, and mean and deviation of each vector; autocast runs it in fp32."""
        tape = self.tape
        source = tape.cast(hidden, FP32) if self.setup.autocast else hidden
        output = tape.new(hidden.rows, hidden.width, source.item)
        saves = (source, tape.new(hidden.rows, 2 * heads, FP32))
        return tape.run((source,), output, saves=saves, gradients=self._if_full(tower, 2 * hidden.width // heads))
