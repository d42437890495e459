"""Public functions: models and data are files or in memory, results are in memory, and files are written if named.

``prune`` and ``apply`` return a ``Result`` with the pruned model. With a third argument, the file to write, they return
the report alone, as the command line uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal, overload

from onnx_oamip.api import comparison, pipeline
from onnx_oamip.api import frontier as frontiers
from onnx_oamip.api.arguments import ShownProgress, settings_of, shown
from onnx_oamip.api.frontier import LEVELS
from onnx_oamip.api.results import Inspection, Result
from onnx_oamip.artifacts.keep_maps import PUBLISHED_THRESHOLD
from onnx_oamip.artifacts.output import Page
from onnx_oamip.artifacts.plan_files import Planned, PlanSource
from onnx_oamip.artifacts.score_files import Scored
from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records import Array, Frontier, Report, Verification
from onnx_oamip.core.renamed_parameters import earlier_names
from onnx_oamip.core.settings import Settings
from onnx_oamip.data import dataset
from onnx_oamip.data.dataset import Samples
from onnx_oamip.data.sources import File, Source
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.loading import ModelSource, load
from onnx_oamip.objective import detect
from onnx_oamip.planning import idle_branches
from onnx_oamip.verification.equivalence import judged


class _Unset(Enum):
    """Type of the default of ``output``, which differs from None."""

    UNSET = "unset"


_UNSET = _Unset.UNSET


@overload
def prune(
    model: ModelSource,
    data: Source | None,
    output: File | None,
    settings: Settings,
    eval_data: Source | None = None,
    *,
    progress: ShownProgress = None,
    scores: File | None = None,
    keep_map: File | None = None,
    page: Page | None = None,
) -> Report: ...


@overload
def prune(
    model: ModelSource,
    data: Source | None = None,
    *,
    settings: Settings | None = None,
    eval_data: Source | None = None,
    progress: ShownProgress = None,
    scores: File | None = None,
    **options: Any,
) -> Result: ...


@earlier_names(path="model", source="data")
def prune(
    model: ModelSource,
    data: Source | None = None,
    output: File | Literal[_Unset.UNSET] | None = _UNSET,
    settings: Settings | None = None,
    eval_data: Source | None = None,
    *,
    progress: ShownProgress = None,
    scores: File | None = None,
    keep_map: File | None = None,
    page: Page | None = None,
    **options: Any,
) -> Result | Report:
    """Prune a model to budgets and verify the result.

    Args:
        model: Model file, or an ``onnx.ModelProto``, which is not changed.
        data: Calibration samples: a path, ``module:function``, arrays by input name, an array, a tuple of arrays with
            labels last, or an iterable of feeds, such as a ``DataLoader``. None for methods that need no data.
        output: File to write, or None to write nothing and get the report alone. Default: the result stays in memory.
        settings: Budgets and options.
        eval_data: Samples to measure the result on. Default: the held-out part of ``data``.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.
        scores: File of scores written by ``score``, used in place of the importance method.
        keep_map: File to write the kept indices of every weight to; needs ``output``.
        page: HTML page about the run, written with the model; needs ``output``.
        **options: Settings by name, such as ``macs=0.5``; they take precedence over ``settings``.

    Returns:
        The pruned model with its report; the report alone if ``output`` is given.

    Raises:
        OamipError: Bad input or a missing package (``exit_code`` 2). No file is written.
        BudgetNotMet: No plan meets the budgets (``exit_code`` 1). No file is written.
        GateFailed: The result failed a check (``exit_code`` 1). No file is written.
    """
    asked = settings_of(settings, options)
    with shown(progress) as callback:
        if output is _UNSET:
            _refuse_files(keep_map, page)
            return pipeline.pruned(
                model, data, asked, eval_data=eval_data, progress=callback, scores=scores
            )
        return pipeline.prune(
            model,
            data,
            output,
            asked,
            eval_data,
            progress=callback,
            scores=scores,
            keep_map=keep_map,
            page=page,
        )


@earlier_names(path="model", source="data")
def plan(
    model: ModelSource,
    data: Source | None = None,
    output: File | None = None,
    settings: Settings | None = None,
    eval_data: Source | None = None,
    *,
    progress: ShownProgress = None,
    scores: File | None = None,
    **options: Any,
) -> Planned:
    """Choose the units to keep under budgets.

    Args:
        model: Model file, or an ``onnx.ModelProto``.
        data: Calibration samples as for ``prune``, or None for methods that need no data.
        output: Plan file to write (JSON). Default: none is written.
        settings: Budgets and options.
        eval_data: Samples to measure on. Default: the held-out part of ``data``.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.
        scores: File of scores written by ``score``, used in place of the importance method.
        **options: Settings by name; they take precedence over ``settings``.

    Returns:
        The plan with its predicted cost, which ``apply`` takes and ``Planned.save`` writes.

    Raises:
        OamipError: Bad input or a missing package. No file is written.
        BudgetNotMet: No plan meets the budgets. No file is written.
    """
    asked = settings_of(settings, options)
    with shown(progress) as callback:
        return pipeline.plan(
            model, data, output, asked, eval_data, progress=callback, scores=scores
        )


@earlier_names(path="model", source="data")
def score(
    model: ModelSource,
    data: Source | None = None,
    output: File | None = None,
    settings: Settings | None = None,
    progress: ShownProgress = None,
    *,
    save_mask: File | None = None,
    mask_threshold: float = PUBLISHED_THRESHOLD,
    **options: Any,
) -> Scored:
    """Score every unit of a model by an importance method.

    The scores are those that ``prune`` uses: if ``data`` has no evaluation part, a fifth of it is held out.

    Args:
        model: Model file, or an ``onnx.ModelProto``.
        data: Calibration samples as for ``prune``, or None for methods that need no data.
        output: File of scores to write (``.npz``). Default: none is written.
        settings: Importance method and its options.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.
        save_mask: File for the keep-map of the units that the programs keep, which the command ``checkpoint`` reads.
        mask_threshold: Least keep variable of a unit in that map.
        **options: Settings by name; they take precedence over ``settings``.

    Returns:
        The scores, with the file that was written if there is one.

    Raises:
        OamipError: Bad input, a missing package, or a mask of scores that are no keep variables. No file is written.
    """
    asked = settings_of(settings, options)
    with shown(progress) as callback:
        return pipeline.score(
            model,
            data,
            output,
            asked,
            callback,
            save_mask=save_mask,
            mask_threshold=mask_threshold,
        )


@earlier_names(path="model", source="data")
def frontier(
    model: ModelSource,
    data: Source,
    settings: Settings | None = None,
    levels: Sequence[float] = LEVELS,
    eval_data: Source | None = None,
    *,
    progress: ShownProgress = None,
    scores: File | None = None,
    save_dir: File | None = None,
    **options: Any,
) -> Frontier:
    """Prune a model to several shares of its MACs, widest first.

    Args:
        model: Model file, or an ``onnx.ModelProto``.
        data: Calibration samples, as for ``prune``.
        settings: Options; other budgets in it hold at every level.
        levels: Shares of the MACs to keep.
        eval_data: Samples to measure on. Default: the held-out part of ``data``.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.
        scores: File of scores written by ``score``, used in place of the importance method.
        save_dir: Folder for the models, named ``MODEL-macs0.5.onnx``; it is made if it does not exist. Default: none
            is written.
        **options: Settings by name; they take precedence over ``settings``.

    Returns:
        One point per level; a level that cannot be met has a reason in place of a result.

    Raises:
        OamipError: Bad input or a missing package.
        BudgetNotMet: No level can be met.
    """
    asked = settings_of(settings, options)
    with shown(progress) as callback:
        return frontiers.frontier(
            model,
            data,
            asked,
            levels,
            eval_data,
            progress=callback,
            scores=scores,
            save_dir=save_dir,
        )


@overload
def apply(
    model: ModelSource,
    plan: PlanSource,
    data: Source | None,
    output: File | None,
    changes: Mapping[str, Any] | None = None,
    *,
    eval_data: Source | None = None,
    progress: ShownProgress = None,
    keep_map: File | None = None,
    page: Page | None = None,
) -> Report: ...


@overload
def apply(
    model: ModelSource,
    plan: PlanSource,
    data: Source | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    eval_data: Source | None = None,
    progress: ShownProgress = None,
    **options: Any,
) -> Result: ...


@earlier_names(path="model", plan_file="plan", source="data")
def apply(
    model: ModelSource,
    plan: PlanSource,
    data: Source | None = None,
    output: File | Literal[_Unset.UNSET] | None = _UNSET,
    changes: Mapping[str, Any] | None = None,
    *,
    eval_data: Source | None = None,
    progress: ShownProgress = None,
    keep_map: File | None = None,
    page: Page | None = None,
    **options: Any,
) -> Result | Report:
    """Carry out a plan, edited or not: rewrite, refit and verify.

    The plan is followed as it is, whatever budget it was made for.

    Args:
        model: Model file, or an ``onnx.ModelProto``.
        plan: Result of ``plan``, or a plan file.
        data: Calibration samples as for ``prune``, or None if the settings of the plan need no data.
        output: File to write, or None to write nothing and get the report alone. Default: the result stays in memory.
        changes: Settings that replace those recorded in the plan, by name.
        eval_data: Samples to measure on. Default: the held-out part of ``data``.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.
        keep_map: File to write the kept indices of every weight to; needs ``output``.
        page: HTML page about the run, written with the model; needs ``output``.
        **options: Settings as in ``changes``.

    Returns:
        The pruned model with its report, which has no scores; the report alone if ``output`` is given.

    Raises:
        OamipError: Bad input, or a plan that does not fit the model. No file is written.
        GateFailed: The result failed a check. No file is written.
    """
    replaced = {**(changes or {}), **options}
    with shown(progress) as callback:
        if output is _UNSET:
            _refuse_files(keep_map, page)
            return pipeline.applied(
                model, plan, data, replaced, eval_data=eval_data, progress=callback
            )
        return pipeline.apply(
            model,
            plan,
            data,
            output,
            replaced,
            eval_data=eval_data,
            progress=callback,
            keep_map=keep_map,
            page=page,
        )


def inspect(model: ModelSource, *, settings: Settings | None = None, **options: Any) -> Inspection:
    """Find what can be removed from a model, what cannot and why, and by what a pruned model is judged.

    Args:
        model: Model file, or an ``onnx.ModelProto``.
        settings: Options ``task``, ``outputs`` and ``shape``.
        **options: Settings by name; they take precedence over ``settings``.

    Returns:
        The model with its units and its objective.

    Raises:
        OamipError: The model cannot be read, or a setting does not fit it.
    """
    asked = settings_of(settings, options)
    loaded = load(model, stated=asked.shapes)
    objective = detect(loaded, None, asked.task, asked.kinds)
    with judged(loaded):
        coupling = idle_branches.without_compared(loaded, couple(loaded), objective)
    return Inspection(loaded, coupling, objective)


def verify(
    original: ModelSource,
    pruned: ModelSource | Result,
    data: Source,
    settings: Settings | None = None,
    *,
    progress: ShownProgress = None,
    **options: Any,
) -> Verification:
    """Compare a pruned model with its original: validity, two batch sizes, output error, agreement, accuracy.

    Args:
        original: Model before pruning, a file or an ``onnx.ModelProto``.
        pruned: Model after pruning, or a ``Result``.
        data: Samples to compare on, as for ``prune``; the evaluation part if there is one.
        settings: Device, batch size and options for images and tables.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.
        **options: Settings by name; they take precedence over ``settings``.

    Returns:
        The checks and measurements; ``failures`` lists the checks that do not hold.

    Raises:
        OamipError: Bad input or a missing package.
        GateFailed: The models have different inputs or outputs, or the pruned model is not valid.
    """
    other = pruned.model if isinstance(pruned, Result) else pruned
    with shown(progress) as callback:
        settings = settings_of(settings, options)
        return comparison.compare(original, other, data, settings, callback)


class Feeds:
    """Samples as a model gets them: an iterator of feeds, and a reader for ONNX Runtime's quantiser."""

    def __init__(self, samples: Samples, size: int) -> None:
        """Start at the first feed.

        Args:
            samples: The samples.
            size: Largest number of samples in a feed.
        """
        self._samples = samples
        self._size = size
        self.rewind()

    def rewind(self) -> None:
        """Start again at the first feed."""
        self._feeds = self._samples.batches(self._size)

    def get_next(self) -> dict[str, Array] | None:
        """Return the next feed.

        Returns:
            Arrays by input name, None after the last feed.
        """
        return next(self, None)

    def __iter__(self) -> Feeds:
        return self

    def __next__(self) -> dict[str, Array]:
        return next(self._feeds)[1]


def feeds(
    model: ModelSource,
    data: Source,
    *,
    settings: Settings | None = None,
    **options: Any,
) -> Feeds:
    """Read samples as ``prune`` does, for other programs that run a model.

    Args:
        model: Model file, or an ``onnx.ModelProto``.
        data: Samples, as for ``prune``; held-out samples under names of their own are left out.
        settings: Batch size, and options for images and tables.
        **options: Settings by name, such as ``batch_size=32`` or ``image_size=224``.

    Returns:
        The feeds, with ``get_next`` as a ``CalibrationDataReader`` of ONNX Runtime has it.

    Raises:
        OamipError: The data cannot be read or do not fit the model.
    """
    asked = settings_of(settings, options)
    dataset.check_extras(data)
    loaded = load(model, stated=asked.shapes)
    samples = dataset.load(data, loaded, reading=asked.reading)
    assert samples is not None
    return Feeds(samples, asked.batch_size)


def _refuse_files(keep_map: File | None, page: Page | None) -> None:
    if keep_map is not None or page is not None:
        raise SettingsError(
            "a keep-map and a page are written with the model; give `output`, or write them by 'Result.save'."
        )
