"""The union-find of channel atoms, against one that merges sets one pair at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_autoslim.tracing.labels import Atoms, Constraints

ATOMS = 24
pairs = st.lists(st.tuples(st.integers(0, ATOMS - 1), st.integers(0, ATOMS - 1)), min_size=1, max_size=12)
# batches of merges, with a look at the result after each
batches = st.lists(pairs, min_size=1, max_size=5)


class Naive:
    def __init__(self, n):
        self.sets = {i: {i} for i in range(n)}

    def join(self, a, b):
        merged = self.sets[a] | self.sets[b]
        for i in merged:
            self.sets[i] = merged

    def smallest(self):
        return [min(self.sets[i]) for i in sorted(self.sets)]


@settings(max_examples=200, deadline=None)
@given(batches)
def test_atoms_merge_as_sets_do(batches):
    atoms, naive = Atoms(), Naive(ATOMS)
    everything = atoms.create(ATOMS)
    for batch in batches:
        left, right = (np.array(side, np.int64) for side in zip(*batch, strict=True))
        atoms.join(left, right)
        for a, b in batch:
            naive.join(a, b)
        assert atoms.find(everything).tolist() == naive.smallest()
    assert atoms.find_all().tolist() == naive.smallest()


@settings(max_examples=50, deadline=None)
@given(pairs, st.randoms())
def test_the_order_of_merges_does_not_matter(pairs, random):
    shuffled = [pair[:: random.choice((1, -1))] for pair in random.sample(pairs, len(pairs))]
    roots = []
    for order in (pairs, shuffled):
        atoms = Atoms()
        atoms.create(ATOMS)
        for a, b in order:
            atoms.join(np.array([a]), np.array([b]))
        roots.append(atoms.find_all().tolist())
    assert roots[0] == roots[1]


def test_fresh_atoms_are_alone_even_after_merges():
    atoms = Atoms()
    a, b = atoms.create(3), atoms.create(3)
    atoms.join(a, b)
    assert atoms.find(b).tolist() == [0, 1, 2]
    c = atoms.create(2)
    assert c.tolist() == [6, 7]
    assert atoms.find(c).tolist() == [6, 7]
    atoms.join(c, b[1:])
    assert atoms.find_all().tolist() == [0, 1, 2, 0, 1, 2, 1, 2]


def test_a_join_of_grids_is_element_by_element_and_of_a_vector_with_itself_nothing():
    atoms = Atoms()
    grid = atoms.create(6).reshape(2, 3)
    atoms.join(grid, grid)
    assert atoms.find_all().tolist() == list(range(6))
    atoms.join(grid[0], grid[1])
    assert atoms.find(grid).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_constraints_take_no_empty_labels_and_no_tie_of_one():
    constraints = Constraints()
    vector = np.arange(4)
    constraints.freeze(None, "nothing")
    constraints.tie_counts([vector])
    assert constraints.frozen_vectors == []
    assert constraints.count_ties == []
    constraints.freeze(vector, "a reason")
    constraints.tie_counts([vector[:2], vector[2:]])
    assert [reason for _, reason in constraints.frozen_vectors] == ["a reason"]
    assert [[v.tolist() for v in tie] for tie in constraints.count_ties] == [[[0, 1], [2, 3]]]
