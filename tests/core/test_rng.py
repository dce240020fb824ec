import hashlib
import itertools

import torch

from softdefend.core.rng import key, stream


def test_a_key_is_the_first_63_bits_of_the_hash_of_its_position():
    """A frozen contract: changing it would silently change every resumed run."""
    digest = hashlib.blake2b(b"7/attack/3/11/0", digest_size=8).digest()
    assert key(7, "attack", 3, 11) == int.from_bytes(digest, "little") // 2


def test_positions_do_not_share_keys():
    places = list(itertools.product(range(3), ["order", "augment"], range(4), range(4)))
    assert len({key(*place) for place in places}) == len(places)


def test_a_stream_has_no_memory_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first = torch.rand(5, generator=stream(1, "x", 2, 3))
    assert torch.equal(first, torch.rand(5, generator=stream(1, "x", 2, 3)))
    assert torch.equal(before, torch.random.get_rng_state())
