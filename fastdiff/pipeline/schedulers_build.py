"""From what a step computes to rows of the step kernel: which operand goes where, and what is left for the next step."""

import numpy as np

from fastdiff.ops.solver_step import COEF, MAX_OUTPUTS, MAX_SLOTS
from fastdiff.pipeline.schedulers_plan import (
    LostError,
    Node,
    Plan,
    Relation,
    arrays,
    mapped,
    ratio,
    references,
    slot_of,
)
from fastdiff.pipeline.schedulers_probe import (
    CLAMPED,
    DEAD,
    NOISE,
    ONE,
    OUTPUT,
    SAMPLE,
    SLOT,
    NotAffineError,
    Ref,
    Response,
)

_SAME = 1e-5  # relative: coefficients that a scheduler computes twice, in float32
_EXACT, _ZERO, _LEAST = 1e-9, 1e-11, 1e-4
_COLUMN = {name: index for index, name in enumerate(COEF)}
_SLOTS = range(MAX_SLOTS)


def make_plan(node: Node, response: Response, in_kernel: bool = False) -> Plan:
    """The rows of a response, for a history that stands as `node` says; `in_kernel` makes drawn noise inside the kernel.

    Raises NotAffineError where the kernel cannot do it in one pass per result.
    """
    return _Builder(node, response).plan(in_kernel)


class _Builder:
    def __init__(self, node: Node, response: Response):
        self.node, self.response = node, response
        self.vectors = {k: self.resolved(v) for k, v in response.outputs.items() if isinstance(v, np.ndarray)}
        self.next = next(iter(self.vectors.values()))
        state = [self.resolved(v) for v in arrays(response.tensors)]
        self.held = {slot_of(v) for v in state} - {None}
        new = [v for v in state if slot_of(v) is None]
        if response.clamp:
            self.raw, self.low, self.high = self.resolved(response.clamp[0]), *response.clamp[1:]
            self.h = np.eye(len(self.raw))[CLAMPED]
        else:
            self.raw = self.h = self._prediction(new)
            self.low, self.high = -np.inf, np.inf
        self.inputs = tuple(s for s in _SLOTS if self.raw[SLOT + s])
        aside = [v for v in new if ratio(v, self.h) is None]
        self.hidden = [v for i, v in enumerate(aside) if not any(np.array_equal(v, w) for w in aside[:i])]
        self.stored = len(new) > len(aside)
        # the sample itself is copied: what follows from it adds to exactly the same number
        self.apart = [v for v in self.hidden if v[SAMPLE] == 1.0 and np.count_nonzero(v) == 1]
        self.brings = False
        self.hidden = [v for v in self.hidden if not any(v is w for w in self.apart)]
        self.relation = self._relate() if self.hidden else None
        if self.relation is None:
            self.apart, self.hidden = [*self.apart, *self.hidden], []

    def plan(self, in_kernel: bool) -> Plan:
        rows = {place: self._row(v) for place, v in self.vectors.items()}
        first, *others = rows
        apart = [self._row(v) for v in self.apart]
        rest = self.relation.rest if self.relation else {}
        held = self.held | {s for s in rest if s >= 0}
        read = {s for s in _SLOTS if any(row[_COLUMN[f"S{s}"]] for row in (*rows.values(), *apart))} | set(self.inputs)
        shown = [place for place in others if ratio(self.vectors[place], self.h) == 1.0]
        own_h = bool(shown) and not self.stored and not read
        slot_h = -1
        if self.stored:  # an element of a slot is read before it is written
            slot_h = _free(held | set(self.inputs))
        elif shown:
            slot_h = 0 if own_h else _free(held | read)
        keep = _free(held | read | ({slot_h} if not own_h else set())) if self.relation else -1
        taken = held | read | {keep} | ({slot_h} if not own_h else set())
        self.places = []
        for _ in apart:
            self.places.append(_free(taken | set(self.places)))
        further = [place for place in others if place not in shown]
        names = {first: "next", **dict.fromkeys(shown, "h"), **{place: i for i, place in enumerate(further)}}
        noise = self._noise(in_kernel, [*rows.values(), *apart])
        relation = self._settled(slot_h, keep)
        tensors = mapped(self.response.tensors, lambda v: self._reference(self.resolved(v), slot_h))
        state = {**self.node.state, **self.response.plain, **tensors}
        used = taken | set(self.places)
        return Plan(
            rows[first],
            (*(rows[place] for place in further), *apart),
            tuple(self.places),
            slot_h,
            own_h,
            keep,
            self.inputs,
            tuple(self.response.outputs),
            tuple(names.get(place) for place in self.response.outputs),
            self.response.kind,
            noise,
            dict(self.response.plain),
            tensors,
            tuple(name for name, value in tensors.items() if any(ref.dead >= 0 for ref in references(value))),
            1 + max(used, default=-1),
            Node(state, self.node.depth + 1, relation),
        )

    def resolved(self, v: np.ndarray) -> np.ndarray:
        """v without hidden results: as they were only ever written down together, they can only be read together."""
        dead, known = v[DEAD:ONE], self.node.relation
        if not dead.any():
            return v
        weights = np.zeros_like(dead)
        weights[: len(known.weights)] = known.weights
        times = float(dead @ weights / (weights @ weights))
        if np.abs(dead - times * weights).max() > _SAME * np.abs(dead).max():
            raise LostError("as_fast: a scheduler reads more of an earlier step than its results gave; report this")
        v = v.copy()
        v[DEAD:ONE] = 0.0
        v[SLOT + known.kept] += times
        for slot, weight in known.rest.items():
            v[SLOT + slot] -= times * weight
        return v

    def _prediction(self, new: list[np.ndarray]) -> np.ndarray:
        """What the kernel forms first: a result that is remembered or shown, else the next state itself."""
        shown = list(self.vectors.values())[1:]
        for v in (*new, *shown, self.next):
            if (v[OUTPUT] or v is self.next) and np.count_nonzero(v[SLOT:DEAD]) < MAX_OUTPUTS and v[ONE] == 0.0:
                return v
        raise NotAffineError(f"a result needs more than {MAX_OUTPUTS} inputs")

    def _relate(self) -> Relation | None:
        """The next state as a mix of the hidden results and what the history holds; slot -1 stands for the prediction."""
        read = {s for s in _SLOTS if self.next[SLOT + s]}
        for slots in (sorted(self.held), sorted(self.held | read)):
            columns = [*self.hidden, self.h, *(np.eye(len(self.h))[SLOT + s] for s in slots)]
            columns = np.stack(columns, axis=1)
            found = np.linalg.lstsq(columns, self.next, rcond=None)[0]
            scale = np.abs(self.next).max()
            if np.abs(columns @ found - self.next).max() <= _EXACT * scale and abs(found[0]) >= _LEAST * scale:
                break
        else:
            return None
        n = len(self.hidden)
        rest = {s: float(w) for s, w in zip([-1, *slots], found[n:], strict=True) if abs(w) > _ZERO * scale}
        self.stored |= -1 in rest
        return Relation(-1, np.where(np.abs(found[:n]) > _ZERO * scale, found[:n], 0.0), rest)

    def _settled(self, slot_h: int, keep: int) -> Relation | None:
        if self.relation is None:
            return None
        rest = {slot_h if slot < 0 else slot: weight for slot, weight in self.relation.rest.items()}
        return Relation(keep, self.relation.weights, rest)

    def _reference(self, v: np.ndarray, slot_h: int) -> Ref:
        if (slot := slot_of(v)) is not None:
            return Ref(slot=slot, scale=float(v[SLOT + slot]))
        if (scale := ratio(v, self.h)) is not None:
            return Ref(slot=slot_h, scale=scale)
        place = [np.array_equal(v, w) for w in (*self.apart, *self.hidden)].index(True)
        return Ref(slot=self.places[place]) if place < len(self.apart) else Ref(dead=place - len(self.apart))

    def _row(self, v: np.ndarray) -> np.ndarray:
        raw, row = self.raw, np.zeros(len(COEF))
        beside = v[OUTPUT] if raw[OUTPUT] == 0.0 else 0.0  # then x brings the output, where no noise is in it
        share = float(v is raw) if v is raw or not v[OUTPUT] or beside else v[OUTPUT] / raw[OUTPUT]
        if raw[ONE] or (beside and (raw[NOISE] or any(w[NOISE] for w in self.vectors.values()))):
            raise NotAffineError("the model's output enters a result beside the prediction")
        self.brings |= bool(beside)
        rest = v - share * raw
        rest[np.abs(rest) < _ZERO * (np.abs(v) + np.abs(share * raw)).max()] = 0.0
        put = {"a": raw[NOISE], "b0": raw[OUTPUT], "d": raw[SAMPLE], "lo": self.low, "hi": self.high, "c_in": 1.0}
        put |= {f"b{1 + i}": raw[SLOT + s] for i, s in enumerate(self.inputs)}
        put |= {"B": rest[CLAMPED], "R": share} if self.response.clamp else {"B": share}
        put |= {"A": rest[NOISE] + beside, "D": rest[SAMPLE], "E": rest[ONE]} | {
            f"S{s}": rest[SLOT + s] for s in _SLOTS
        }
        for name, value in put.items():
            row[_COLUMN[name]] = value
        return row

    def _noise(self, in_kernel: bool, rows: list[np.ndarray]) -> str:
        if self.brings:
            return "output"
        if not self.response.draws:
            return "given" if self.raw[NOISE] or any(row[_COLUMN["A"]] for row in rows) else "none"
        if not in_kernel or self.raw[NOISE]:
            return "drawn"
        for row in rows:
            row[_COLUMN["C0"]], row[_COLUMN["A"]] = row[_COLUMN["A"]], 0.0
        return "kernel"


def _free(taken: set[int]) -> int:
    for slot in _SLOTS:
        if slot not in taken:
            return slot
    raise NotAffineError(f"it remembers more than {MAX_SLOTS} tensors")
