"""The order of images, for any layout of ranks and workers: every image of a pass once, and the same after a stop."""

import itertools
from dataclasses import dataclass
from typing import Any

from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from scalekd_hf.data.sources import Shards, Table
from scalekd_hf.data.stream import ImageStream, Partition


class Numbers(Table):
    """A table whose rows are their numbers."""

    def __init__(self, counts):
        self.count, self._order = sum(counts), ((-1, -1), None)

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return number


class NumberedShards(Shards):
    """Shards of so many rows each, which are their numbers."""

    def __init__(self, counts):
        self.pieces, self.counts = [[count] for count in counts], counts
        self.offsets = [0, *itertools.accumulate(counts)]

    def _unit(self, unit, start):
        yield from range(self.offsets[unit] + start, self.offsets[unit + 1])


@dataclass
class Same:
    """Prepares nothing."""

    repeats: int
    training: bool = True
    image_column: Any = None


def taken(source, repeats, buffer_size, layout, images_seen, steps):
    """Pass, number and repeat of the images of the next steps, those of all ranks side by side, as loaders give them."""
    stream = ImageStream(source, Same(repeats), seed=3, buffer_size=buffer_size)
    stream.partition, stream.images_seen = layout, images_seen
    batches = {}
    for rank in range(layout.world_size):
        stream.rank = rank
        read = stream._from_shards if isinstance(source, Shards) else stream._from_table
        for worker in range(layout.workers):
            places = read(source, worker, layout.workers)
            for step in range(worker, steps, layout.workers):
                batches[step, rank] = [place[:3] for place in itertools.islice(places, layout.batch_size)]
    return [image for step in range(steps) for rank in range(layout.world_size) for image in batches[step, rank]]


layouts = st.builds(Partition, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


@examples(40)
@given(
    st.sampled_from((Numbers, NumberedShards)),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 12),
    layouts,
    layouts,
    st.data(),
)
def test_every_layout_gives_a_pass_once_and_goes_on_where_it_stopped(kind, counts, repeats, buffer, one, two, data):
    source, size = kind(counts), sum(counts) * repeats

    def sequence(layout, seen, images):
        return taken(kind(counts), repeats, buffer, layout, seen, -(-images // layout.step))

    def is_pass(images, number):
        return sorted(images) == [(number, row, repeat) for row in range(sum(counts)) for repeat in range(repeats)]

    whole = sequence(one, 0, 3 * size)
    for number in range(3):
        assert is_pass(whole[number * size : (number + 1) * size], number)
    stopped = data.draw(st.integers(0, len(whole) // one.step - 1)) * one.step
    assert sequence(one, stopped, len(whole) - stopped) == whole[stopped:]
    # Another layout from there on: the rest of the pass is dealt out anew, and each later pass is whole.
    other = Partition(two.batch_size, two.world_size, two.workers, start=stopped)
    begun, rest = divmod(stopped, size)
    later = sequence(other, stopped, 3 * size - rest)
    assert {place[0] for place in later[: size - rest]} <= {begun}
    for number in range(1, 3):
        assert is_pass(later[number * size - rest : (number + 1) * size - rest], begun + number)
    again = stopped + data.draw(st.integers(0, len(later) // other.step - 1)) * other.step
    assert sequence(other, again, len(later) - (again - stopped)) == later[again - stopped :]
    if isinstance(source, Numbers):  # whose order no layout changes
        assert later[: len(whole) - stopped] == whole[stopped:][: len(later)]
    else:
        assert len(set(later[: size - rest])) == size - rest
