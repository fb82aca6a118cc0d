"""IDEFICS's forward over one packed row, as a memory graph: every operation as sizes. No torch.

It follows modeling/attention.py and modeling/packed_forward.py. What an operation keeps for its backward is said where
it stands; `scripts/benchmarks/check_plan.py` compares the result with what torch's allocator counts.

Letters: N images of the row, L latents of an image, E their width.
"""

from collections.abc import Callable

from finetune.planning.memory_graph import MemoryGraph, Operation, Tensor
from finetune.planning.static_memory import FP32, INT64, NF4_GROUP, RowSize, Setup
from modeling.device import choices
from modeling.towers import IMAGE_TOWERS, QUANTIZED_TOWERS

ROWS = 16
"""Rows of logits whose losses are computed at once (modeling/packed_forward.py)."""


def forward_operations(setup: Setup, row: RowSize) -> list[Operation]:
    """Return every operation from the pixels and ids of a row to its loss."""
    return _Forward(setup).run(row)


class _Forward:
    """What all operations need: the setup, the graph they are added to, and what lives until the forward ends."""

    def __init__(self, setup: Setup):
        self.setup, self.config, self.graph = setup, setup.config, MemoryGraph()
        self.kept: list[Tensor] = []
        """Kept by a variable, or by autocast, until the forward ends."""

    def run(self, row: RowSize) -> list[Operation]:
        config, setup, graph = self.config, self.setup, self.graph
        with graph.part("batch"):  # which latents a token sees: as integers, then as a mask in the model's type
            latents = config["perceiver_config"]["resampler_n_latents"]
            self.kept += [graph.apply((), graph.tensor(row.tokens, latents, item)) for item in (INT64, setup.item)]
        images = self._images(row.images)
        with graph.part("decoder"):
            hidden = self._embedded(row.tokens)
        self.kept += [hidden, images]
        for layer in range(config["num_hidden_layers"]):
            checkpointed = layer < setup.checkpointing
            if layer % config["cross_layer_interval"] == 0:
                with graph.part("cross_attention"):
                    hidden = self._layer(checkpointed, lambda x: self._cross_layer(x, images), hidden, images)
            with graph.part("decoder"):
                hidden = self._layer(checkpointed, self._decoder_layer, hidden)
        with graph.part("decoder"):
            hidden = self._rms_norm(hidden, "decoder")
        graph.keep(*self.kept)
        with graph.part("head"):
            self._head(hidden, row.supervised)
        return graph.operations

    # Vision tower and resampler

    def _images(self, images: int) -> Tensor:
        """[N * L, E]: what cross-attention reads. Where a tower of images is trained, a row without images gets one."""
        if any(self.setup.mode(tower) != "frozen" for tower in IMAGE_TOWERS):
            images = max(images, 1)
        if self.setup.cached:  # the batch has the features; joining its images to [N * L, E] copies nothing
            latents = self.config["perceiver_config"]["resampler_n_latents"]
            width = self.config["vision_config"]["embed_dim"]
            with self.graph.part("batch"):
                return self.graph.apply((), self.graph.tensor(images * latents, width, self.setup.item))
        with self.graph.part("vision"):
            patches = self._vision(images)
        with self.graph.part("resampler"):
            return self._resampled(patches, images)

    def _vision(self, images: int) -> Tensor:
        vision, setup, graph = self.config["vision_config"], self.setup, self.graph
        grid, width = (vision["image_size"] // vision["patch_size"]) ** 2, vision["embed_dim"]
        item = setup.item_of("vision")
        pixels = graph.tensor(images, 3 * vision["image_size"] ** 2, setup.item)
        if setup.item < FP32:
            self.kept.append(graph.apply((), pixels))
        convolution = self._if_full("vision", width * 3 * vision["patch_size"] ** 2)
        patches = graph.apply((), graph.tensor(images * grid, width, item), saves=(pixels,), gradients=convolution)
        with_class = graph.apply((patches,), graph.tensor(images * (grid + 1), width, item))
        positions = self._if_full("vision", (grid + 2) * width)
        placed = graph.apply((with_class,), graph.tensor(with_class.rows, width, item), gradients=positions)
        hidden = self._layer_norm(placed, "vision")
        for _ in range(vision["num_hidden_layers"]):
            hidden = self._layer(setup.checkpointing > 0, self._vision_layer, hidden)
        return hidden

    def _vision_layer(self, hidden: Tensor) -> Tensor:
        vision, graph = self.config["vision_config"], self.graph
        width = vision["embed_dim"]
        normed = self._layer_norm(hidden, "vision")
        query, key, value = (self._linear(normed, width, "vision", bias=True) for _ in range(3))
        attended = self._attention(query, key, value, vision["num_attention_heads"])
        hidden = graph.add(hidden, self._linear(attended, width, "vision", bias=True))
        inner = self._linear(self._layer_norm(hidden, "vision"), vision["intermediate_size"], "vision", bias=True)
        active = graph.elementwise(inner, saves=(inner,))
        return graph.add(hidden, self._linear(active, width, "vision", bias=True))

    def _resampled(self, patches: Tensor, images: int) -> Tensor:
        resampler, graph = self.config["perceiver_config"], self.graph
        count, width, item = resampler["resampler_n_latents"], patches.width, self.setup.item_of("resampler")
        gradients = self._if_full("resampler", count * width)
        latents = graph.apply((), graph.tensor(images * count, width, item), gradients=gradients)
        for _ in range(resampler["resampler_depth"]):
            latents = graph.add(latents, self._resampler_attention(patches, latents, images))
            inner = self._linear(self._layer_norm(latents, "resampler"), 4 * width, "resampler")
            active = graph.tensor(inner.rows, inner.width, inner.item)
            graph.apply((inner,), active, saves=(active,))
            latents = graph.add(latents, self._linear(active, width, "resampler"))
        return self._layer_norm(latents, "resampler")

    def _resampler_attention(self, patches: Tensor, latents: Tensor, images: int) -> Tensor:
        """Not fused: the scores, [latents * heads, patches + latents of an image], exist."""
        resampler, graph = self.config["perceiver_config"], self.graph
        heads = resampler["resampler_n_heads"]
        width = heads * resampler["resampler_head_dim"]
        context, normed = self._layer_norm(patches, "resampler"), self._layer_norm(latents, "resampler")
        query = self._linear(normed, width, "resampler")
        joined = [
            graph.apply(
                (context, normed),
                graph.tensor(context.rows + normed.rows, context.width, context.item),
                passes_gradient_on=True,
            )
            for _ in ("key", "value")
        ]
        key, value = (self._linear(one, width, "resampler") for one in joined)
        if resampler["qk_layer_norms_perceiver"]:
            query, key = self._layer_norm(query, "resampler", heads), self._layer_norm(key, "resampler", heads)
        query, value = graph.elementwise(query), graph.elementwise(value)
        columns = joined[0].rows // max(images, 1)
        scores = graph.tensor(latents.rows * heads, columns, query.item)
        graph.apply((query, key), scores, saves=(query, key))
        shifted = graph.elementwise(scores, passes_gradient_on=True)
        weights = graph.tensor(scores.rows, columns, scores.item)
        graph.apply((shifted,), weights, saves=(weights,))
        attended = graph.apply((weights, value), graph.tensor(latents.rows, width, value.item), saves=(weights, value))
        return self._linear(graph.elementwise(attended, passes_gradient_on=True), latents.width, "resampler")

    # Decoder and cross-attention

    def _embedded(self, tokens: int) -> Tensor:
        config, graph, width = self.config, self.graph, self.config["hidden_size"]
        gradients = self._if_full("embeddings_and_head", config["vocab_size"] * width)
        gradients += self._if_full("added_tokens", config["additional_vocab_size"] * width)
        output = graph.tensor(tokens, width, self.setup.item_of("embeddings_and_head"))
        return graph.apply((), output, gradients=gradients, scratch=2 * output.nbytes)  # a row of either table

    def _decoder_layer(self, hidden: Tensor) -> Tensor:
        width, heads, graph = hidden.width, self.config["num_attention_heads"], self.graph
        normed = self._rms_norm(hidden, "decoder")
        query, key, value = (self._linear(normed, width, "decoder") for _ in range(3))
        rotations = [graph.tensor(hidden.rows, width // heads, value.item) for _ in ("cosine", "sine")]
        query, key = (
            graph.apply((one,), graph.tensor(one.rows, width, one.item), saves=rotations) for one in (query, key)
        )
        attended = self._packed_attention(query, key, value, heads)
        hidden = graph.add(hidden, self._linear(attended, width, "decoder"))
        return graph.add(hidden, self._mlp(self._rms_norm(hidden, "decoder"), "decoder"))

    def _cross_layer(self, hidden: Tensor, images: Tensor) -> Tensor:
        width, heads, tower = hidden.width, self.config["num_attention_heads"], "cross_attention"
        query = self._linear(self._rms_norm(hidden, tower), width, tower)
        key, value = self._linear(images, width, tower), self._linear(images, width, tower)
        if self.config["qk_layer_norms"]:
            query, key = self._rms_norm(query, tower, heads), self._rms_norm(key, tower, heads)
        attended = self._packed_attention(query, key, value, heads)
        masked = self.graph.elementwise(self._linear(attended, width, tower))  # zero where a token sees no image
        hidden = self.graph.add(hidden, self._gated(masked))
        return self.graph.add(hidden, self._gated(self._mlp(self._rms_norm(hidden, tower), tower)))

    def _gated(self, tensor: Tensor) -> Tensor:
        gradients = self._if_full("gates", 1 if self.config["alpha_type"] == "float" else tensor.width)
        output = self.graph.tensor(tensor.rows, tensor.width, tensor.item)
        return self.graph.apply((tensor,), output, saves=(tensor,) if gradients else (), gradients=gradients)

    def _mlp(self, hidden: Tensor, tower: str) -> Tensor:
        inner = self.config["intermediate_size"]
        gate, up = self._linear(hidden, inner, tower), self._linear(hidden, inner, tower)
        product = self.graph.apply((gate, up), self.graph.tensor(gate.rows, inner, gate.item), saves=(gate, up))
        return self._linear(product, hidden.width, tower)

    def _packed_attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Results of all sequences (or images) are joined to a row; the gradients of all parts exist at once."""
        joining = query.nbytes + key.nbytes + value.nbytes + max(query.nbytes, key.nbytes)
        attended = self._attention(query, key, value, heads, scratch=joining)
        return self.graph.elementwise(attended, passes_gradient_on=True)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int, *, scratch: int = 0) -> Tensor:
        """Fused: it keeps no scores, only one logarithm for each query and head."""
        output = self.graph.tensor(query.rows, query.width, query.item)
        logarithms = self.graph.tensor(query.rows, heads, FP32)
        saves, scratch = (query, key, value, output, logarithms), max(scratch, 2 * query.nbytes)
        return self.graph.apply((query, key, value), output, saves=saves, scratch=scratch)

    # Head and loss

    def _head(self, hidden: Tensor, supervised: int) -> None:
        """The forward computes its gradients, a few rows of logits at a time; they wait for the backward."""
        config, graph, setup = self.config, self.graph, self.setup
        chosen = graph.apply((hidden,), graph.tensor(supervised, hidden.width, hidden.item))
        vocabulary, added = config["vocab_size"], config["additional_vocab_size"]
        if setup.sharded:
            self._sharded_head(chosen, vocabulary, added)
            return
        waiting = [graph.tensor(supervised, hidden.width, hidden.item)]
        for tower, rows in (("embeddings_and_head", vocabulary), ("added_tokens", added)):
            if setup.is_full(tower):
                waiting.append(graph.tensor(rows, hidden.width, FP32))
        if setup.autocast and setup.is_full("embeddings_and_head"):
            self._weight_in_bf16(hidden.width, vocabulary)
        item, width = setup.item if setup.autocast else hidden.item, vocabulary + added
        # A CPU copies to fp32 what it adds to fp32, or writes as fp32.
        copied = FP32 if item < FP32 and not setup.gpu else 0
        # Logits, their logarithms in fp32, and their gradient where it is not in fp32 itself.
        at_once = min(supervised, choices("cuda" if setup.gpu else "cpu").head_rows)
        scratch = at_once * width * (item + copied + FP32 + (item if item < FP32 else 0))
        if setup.is_full("embeddings_and_head"):  # the weight's gradient of a few rows, before it is added
            scratch += vocabulary * hidden.width * (item + copied)
        gradients = sum(one.nbytes for one in waiting[1:])
        graph.apply((chosen,), graph.tensor(1, 1, FP32), saves=waiting, gradients=gradients, scratch=scratch)

    def _sharded_head(self, chosen: Tensor, vocabulary: int, added: int) -> None:
        """A sharded head runs once: all logits exist, with their gradient; those of both parts are joined."""
        graph, width = self.graph, vocabulary + added
        gradients = self._if_full("embeddings_and_head", vocabulary * chosen.width)
        gradients += self._if_full("added_tokens", added * chosen.width)
        logits = graph.tensor(chosen.rows, width, self.setup.item)
        graph.apply((chosen,), logits, saves=(chosen,) if gradients else (), gradients=gradients, scratch=logits.nbytes)
        scratch = 2 * FP32 * min(chosen.rows, ROWS) * width
        graph.apply((logits,), graph.tensor(1, 1, FP32), saves=(logits,), scratch=scratch)

    # What all of them are made of

    def _layer(self, checkpointed: bool, layer: Callable[[Tensor], Tensor], hidden: Tensor, *others: Tensor) -> Tensor:
        return self.graph.checkpoint(layer, hidden, *others) if checkpointed else layer(hidden)

    def _if_full(self, tower: str, parameters: int) -> int:
        """Return the bytes of the gradients of these parameters: none unless their tower is trained in full."""
        return FP32 * parameters if self.setup.is_full(tower) else 0

    def _linear(self, hidden: Tensor, width: int, tower: str, *, bias: bool = False) -> Tensor:
        """Keeps its input where its weight is trained; a 4-bit weight exists in the input's type while it is used."""
        setup, graph = self.setup, self.graph
        parameters = hidden.width * width
        source = graph.cast(hidden, setup.item) if setup.autocast else hidden
        saves = [source] if setup.is_full(tower) else []
        if setup.autocast and setup.item_of(tower) == FP32:
            saves.append(self._weight_in_bf16(hidden.width, width))
        in_4_bits = setup.quantize and tower in QUANTIZED_TOWERS and hidden.width % NF4_GROUP == 0
        output = graph.apply(
            (source,),
            graph.tensor(hidden.rows, width, source.item),
            saves=saves,
            gradients=self._if_full(tower, parameters + width * bias),
            scratch=parameters * source.item if in_4_bits else 0,
        )
        return self._with_lora(hidden, output) if setup.mode(tower) == "lora" else output

    def _weight_in_bf16(self, rows: int, width: int) -> Tensor:
        """Autocast's copy, which it keeps until the forward ends."""
        copy = self.graph.apply((), self.graph.tensor(rows, width, self.setup.item))
        self.kept.append(copy)
        return copy

    def _with_lora(self, hidden: Tensor, output: Tensor) -> Tensor:
        """The factors are fp32. Each adapted layer casts its input to fp32, unless it is, and keeps that copy."""
        setup, graph = self.setup, self.graph
        source = graph.cast(hidden, FP32)
        if setup.dropout:  # keeps its mask: a byte a number on a GPU, the numbers' own type on a CPU
            mask = graph.tensor(source.rows, source.width, 1 if setup.gpu else source.item)
            source = graph.elementwise(source, saves=(mask,))
        if setup.autocast:
            source = graph.cast(source, setup.item)
        low = graph.tensor(hidden.rows, setup.rank, source.item)
        graph.apply((source,), low, saves=(source,), gradients=FP32 * setup.rank * hidden.width)
        high = graph.tensor(hidden.rows, output.width, source.item)
        gradients = FP32 * setup.rank * output.width
        if setup.item == FP32 and not setup.quantize:  # one operation, modeling/fused.py
            return graph.apply((output, low), high, saves=(low,), gradients=gradients, passes_gradient_on=True)
        graph.apply((low,), high, saves=(low,), gradients=gradients)
        return graph.cast(graph.add(output, graph.elementwise(high)), output.item)

    def _rms_norm(self, hidden: Tensor, tower: str, heads: int = 1) -> Tensor:
        """Computed in fp32; keeps its input, and one root for each vector."""
        graph, full = self.graph, self.setup.is_full(tower)
        return graph.apply(
            (hidden,),
            graph.tensor(hidden.rows, hidden.width, self.setup.item_of(tower)),
            saves=[hidden, graph.tensor(hidden.rows, heads, FP32)],
            gradients=self._if_full(tower, hidden.width // heads),
            scratch=(full + 3 * (hidden.item < FP32)) * FP32 * hidden.rows * hidden.width,
        )

    def _layer_norm(self, hidden: Tensor, tower: str, heads: int = 1) -> Tensor:
        """Keeps its input, and the mean and deviation of each vector; autocast computes it in fp32."""
        graph = self.graph
        source = graph.cast(hidden, FP32) if self.setup.autocast else hidden
        output = graph.tensor(hidden.rows, hidden.width, source.item)
        saves = (source, graph.tensor(hidden.rows, 2 * heads, FP32))
        return graph.apply((source,), output, saves=saves, gradients=self._if_full(tower, 2 * hidden.width // heads))
