"""The replay of a forward and its backward: bytes worked out by hand."""

from finetune.planning.memory_graph import MemoryGraph, peak


def test_product_keeps_its_input_until_its_backward():
    graph = MemoryGraph("layer")
    pixels = graph.apply((), graph.tensor(10, 4, 4))
    hidden = graph.apply((pixels,), graph.tensor(10, 2, 4), saves=(pixels,), gradients=32)
    graph.apply((hidden,), graph.tensor(1, 1, 4))
    assert peak(graph.operations, accumulated=False) == {"layer": 160 + 4 + 80, "gradients": 32}
    assert peak(graph.operations, accumulated=True) == {"layer": 160 + 4 + 80, "gradients": 32}


def test_frozen_operations_save_nothing():
    graph = MemoryGraph("tower")
    hidden = graph.apply((), graph.tensor(10, 4, 4))
    for _ in range(5):
        hidden = graph.elementwise(hidden, saves=(hidden,))
    assert peak(graph.operations, accumulated=False) == {"tower": 2 * 160}


def test_tensor_saved_twice_counts_once():
    graph = MemoryGraph("layer")
    hidden = graph.apply((), graph.tensor(10, 4, 4), gradients=8)
    left, right = graph.elementwise(hidden, saves=(hidden,)), graph.elementwise(hidden, saves=(hidden,))
    graph.apply((left, right), graph.tensor(1, 1, 4))
    assert peak(graph.operations, accumulated=False)["layer"] == 160 + 4 + 3 * 160


def test_checkpoint_keeps_only_the_input_of_a_layer():
    def layer(hidden):
        for _ in range(4):
            hidden = graph.elementwise(hidden, saves=(hidden,))
        return hidden

    def held(run):
        hidden = graph.apply((), graph.tensor(10, 4, 4), gradients=8)
        for _ in range(6):
            hidden = run(hidden)
        graph.apply((hidden,), graph.tensor(1, 1, 4))
        return peak(graph.operations, accumulated=True)["layer"]

    graph = MemoryGraph("layer")
    plain = held(layer)
    graph = MemoryGraph("layer")
    checkpointed = held(lambda hidden: graph.checkpoint(layer, hidden))
    assert plain == (24 + 2) * 160 + 4
    assert checkpointed == (6 + 3 + 2) * 160 + 4
