"""The figures of a small tree, counted by hand."""

from structure import measure

FILES = {
    "house/a.py": '''def run():
    """Return both."""
    return _once() + _twice() + _twice()


def _once():
    return 1


def _twice():
    return 2
''',
    "house/rooms/b.py": """class Room:
    def size(self):
        def side():
            return 2

        return side() * self._height()

    def _height(self):
        return 3
""",
}


def test_structure_counts_by_hand():
    found = measure(FILES)
    assert found.folders == {"house": 1, "house/rooms": 1}
    assert found.lines == 20
    assert sorted(found.lengths) == [2, 2, 2, 2, 3, 5]
    assert sorted(found.called_once) == [2, 2]  # _once and _height; _twice is called twice, side is not private
