"""Contexts that were encoded once, for the many calls that come with them."""

from collections.abc import Callable

import torch

from fastdiff.ops.memory import Arena
from fastdiff.program import GraphProgram, Program, record

Tensor = torch.Tensor
Place = tuple[int, Program | GraphProgram]
_KEPT = 2  # of one shape: guidance may call with a prompt and an empty one in turn


class EncodedContexts:
    """What a lowered model computes of its contexts, in place, for the contexts of each shape that were used last.

    encode  from the context to what depends on nothing else, through fastdiff.ops only
    """

    def __init__(self, encode: Callable) -> None:
        self._encode = encode
        self._places: dict[tuple, list[Place]] = {}  # those used last come first

    def encoded(self, key: tuple, context: tuple[Tensor, ...]) -> tuple[tuple, tuple[Tensor, ...]]:
        """The key of the place where this context lies, and what was made of it; computed where no place holds it."""
        if not context:
            return key, ()
        places = self._places.setdefault(key, [])
        place = next((place for place in places if place[1].holds(*context)), None)
        if place is None:
            place = self._fill(places, context)
        if places[0] is not place:
            places.remove(place)
            places.insert(0, place)
        return (*key, place[0]), place[1].outputs

    def _fill(self, places: list[Place], context: tuple[Tensor, ...]) -> Place:
        if len(places) < _KEPT:
            # memory of its own: what it made must outlive the runs of other programs
            places.append((len(places), record(self._encode, context, Arena())))
            return places[-1]
        place = places[-1]
        place[1].load(*context)
        place[1].run()
        return place
