"""Find places for exits in a network."""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from .trace import ModuleOutput, Trace


def exit_places(survey: Trace, output: Tensor) -> list[tuple[float, ModuleOutput]]:
    """Return the places for exits, in running order, each with the share of multiply-accumulates before it.

    A place is a submodule that runs exactly once, and whose output is the only value, computed so far from inputs and
    parameters, that is needed later: the end of a residual block, not its inside.
    """
    until = survey.needed_until(survey.node(output))
    total = survey.operations[-1].macs
    runs = Counter(moment.name for moment in survey.moments)
    found = []
    for moment in survey.moments:
        share = survey.operations[moment.time - 1].macs / total if total and moment.time else 0.0
        if runs[moment.name] == 1 and 0 < share < 1 and _usable(moment, output) and _is_only(survey, moment, until):
            found.append((share, moment))
    return found


def spread_exits(survey: Trace, output: Tensor, num_exits: int) -> tuple[str, ...]:
    """Choose `num_exits` - 1 submodules that divide the network into parts of about equal multiply-accumulates.

    Among `exit_places` with about the same share, the smallest output wins, then the outermost submodule.

    Returns:
        The names in running order; fewer if there are not enough places.
    """
    places = exit_places(survey, output)
    chosen: list[tuple[float, ModuleOutput]] = []
    for k in range(1, num_exits):
        after = chosen[-1][0] if chosen else 0.0
        free = [(share, moment) for share, moment in places if share > after]
        if not free:
            break
        nearest = min(abs(share - k / num_exits) for share, _ in free)
        near = [(s, m) for s, m in free if abs(s - k / num_exits) <= nearest + 0.02]
        chosen.append(min(near, key=lambda p: (p[1].features.numel(), p[1].name.count("."), p[0])))  # type: ignore[union-attr]
    return tuple(moment.name for _, moment in chosen)


def _usable(moment: ModuleOutput, output: Tensor) -> bool:
    x = moment.features
    return x is not None and x.is_floating_point() and x.dim() > 1 and x.shape[0] == output.shape[0]


def _is_only(survey: Trace, moment: ModuleOutput, until: Mapping[int, int]) -> bool:
    """Whether this output is the only value, computed so far from inputs and parameters, that is needed later."""
    return moment.node in until and not any(
        operation.data and operation.weighed and number != moment.node and until.get(number, -1) >= moment.time
        for number, operation in enumerate(survey.operations[: moment.time])
    )
