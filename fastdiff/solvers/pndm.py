"""Pseudo numerical methods: classical weights on noise predictions, moved by the DDIM transfer (Liu et al. 2022)."""

from fastdiff.process import Level, Process
from fastdiff.solvers.row import Row, Solver

ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
RUNGE_KUTTA = (1 / 6, 2 / 6, 2 / 6, 1 / 6)
_EXACT = frozenset({"data", "noise", "mean"})


def transfer(at: Level, to: Level) -> tuple[float, float]:
    """(A, E) of the DDIM transfer x' = A x + E noise (Liu et al. 2022, eq. 11); without a signal the data count as zero."""
    A = to.alpha / at.alpha if at.alpha else 0.0
    return A, to.sigma - at.sigma * A


class _Plan:
    """Collects rows, and the predictions that later steps average over."""

    def __init__(self, levels: list[Level], process: Process):
        self.levels, self.process = levels, process
        self.rows: list[Row] = []
        self.kept: list[int] = []

    def add(self, step: int, at: Level, to: Level, A: float, B: dict[int, float], keep: bool = False) -> int:
        """Appends a row and returns its index."""
        if keep:
            self.kept.append(len(self.rows))
        self.rows.append(Row(at, to, A, B, step=step))
        return len(self.rows) - 1

    def adams(self, step: int, terms: int) -> None:
        """One step with Adams-Bashforth weights on the newest `terms` kept predictions, this row's own included."""
        at, to = self.levels[step], self.levels[step + 1]
        A, E = transfer(at, to)
        newest = [len(self.rows), *reversed(self.kept)][:terms]
        B = {k: c * E for k, c in zip(newest, ADAMS[len(newest) - 1], strict=True)}
        self.add(step, at, to, A, B, keep=True)

    def runge_kutta(self, step: int) -> None:
        """One pseudo Runge-Kutta step: four calls, of which only the first prediction is kept."""
        at, to = self.levels[step], self.levels[step + 1]
        mid = self.process.levels([0.5 * (at.t + to.t)])[0]
        (A_half, E_half), (A, E) = transfer(at, mid), transfer(at, to)
        # each stage restarts from x: undo the last stage's move, then make this one's
        first = self.add(step, at, mid, A_half, {len(self.rows): E_half}, keep=True)
        second = self.add(step, mid, mid, 1.0, {first: -E_half, first + 1: E_half})
        third = self.add(step, mid, to, A / A_half, {second: -A / A_half * E_half, second + 1: E})
        c = RUNGE_KUTTA
        B = {first: c[0] * E, second: c[1] * E, third: (c[2] - 1.0) * E, third + 1: c[3] * E}
        self.add(step, to, to, 1.0, B)

    def improved_euler(self, step: int) -> int:
        """One step with the mean of the predictions at both ends: two calls, the first prediction is kept."""
        at, to = self.levels[step], self.levels[step + 1]
        A, E = transfer(at, to)
        first = self.add(step, at, to, A, {len(self.rows): E}, keep=True)
        return self.add(step, to, to, 1.0, {first: -0.5 * E, first + 1: 0.5 * E})


def pndm_rows(levels: list[Level], process: Process) -> list[Row]:
    """F-PNDM: three pseudo Runge-Kutta steps (four calls each), then four-term Adams-Bashforth."""
    plan = _Plan(levels, process)
    for step in range(len(levels) - 1):
        if step < 3 and levels[step + 1].sigma > 0.0:
            plan.runge_kutta(step)
        else:
            plan.adams(step, 4)
    return plan.rows


def s_pndm_rows(levels: list[Level], process: Process) -> list[Row]:
    """S-PNDM and diffusers' PLMS differ only in how many predictions follow an improved Euler step; this is two."""
    return _improved_euler_rows(levels, process, terms=2)


def plms_rows(levels: list[Level], process: Process) -> list[Row]:
    """PLMS as in diffusers: the second time occurs twice, for an improved Euler step, then 2, 3 and 4 predictions."""
    return _improved_euler_rows(levels, process, terms=4)


def _improved_euler_rows(levels: list[Level], process: Process, terms: int) -> list[Row]:
    plan = _Plan(levels, process)
    for step in range(len(levels) - 1):
        if step == 0 and levels[1].sigma > 0.0:
            plan.improved_euler(step)
        else:
            plan.adams(step, terms)
    return plan.rows


def ipndm_rows(levels: list[Level], process: Process) -> list[Row]:
    """iPNDM: Adams-Bashforth of rising order 1 to 4, no extra calls."""
    plan = _Plan(levels, process)
    for step in range(len(levels) - 1):
        plan.adams(step, 4)
    return plan.rows


# the weights assume steps of equal change in kappa: second order on every other grid
PNDM = Solver("pndm", pndm_rows, order=2, history="noise", exact=_EXACT, spacing="uniform")
S_PNDM = Solver("s-pndm", s_pndm_rows, order=2, history="noise", exact=_EXACT, spacing="uniform")
PLMS = Solver("plms", plms_rows, order=2, history="noise", exact=_EXACT, spacing="uniform")
IPNDM = Solver("ipndm", ipndm_rows, order=2, history="noise", exact=_EXACT)
SOLVERS = (PNDM, S_PNDM, PLMS, IPNDM)
