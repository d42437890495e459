"""Public functions for what follows a pruning: ``recover``, ``int8``, and ``run`` for all stages of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onnx_oamip.api import quantisation, recovery, run_file, staged_run
from onnx_oamip.api.arguments import ShownProgress, settings_of, shown
from onnx_oamip.api.quantisation import Quantised
from onnx_oamip.api.results import Result
from onnx_oamip.api.staged_run import StagedRun
from onnx_oamip.artifacts.recovered_models import Recovered
from onnx_oamip.core.options import QuantisationOptions
from onnx_oamip.core.settings import Settings
from onnx_oamip.data.sources import File, Source
from onnx_oamip.graph.loading import ModelSource


def recover(
    pruned: ModelSource | Result,
    original: ModelSource,
    data: Source,
    settings: Settings | None = None,
    output: File | None = None,
    *,
    plan_file: File | None = None,
    eval_data: Source | None = None,
    progress: ShownProgress = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Recovered:
    """Train a pruned model, without labels, to answer as its original does.

    The pair may come from this package or from another tool. The graph and the shapes of its parameters stay as they
    are. If the objective does not fall on the held-out samples, the model is left as it was. Needs the extra
    ``recover``.

    Args:
        pruned: Model to train: a file, in memory, or the result of ``prune``.
        original: Model that it was pruned from.
        data: Samples, of which a fifth is held out if there are no evaluation data.
        settings: Options; ``recover`` is the effort (default ten minutes), ``augment`` the changes of samples.
        output: File to write. Default: the model stays in memory.
        plan_file: Plan that the model was pruned by; narrower tensors are then compared by the channels that are kept.
        eval_data: Samples to judge on.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.
        stop: Asked after every step; True ends training with the best so far.
        **options: Settings by name, such as ``recover=500``; they take precedence over ``settings``.

    Returns:
        The trained model, with the losses before and after.

    Raises:
        OamipError: Bad input or a missing package. No file is written.
        GateFailed: The models have different inputs or outputs, or the result fails a check. No file is written.
    """
    with shown(progress) as callback:
        return recovery.recover(
            pruned.model if isinstance(pruned, Result) else pruned,
            original,
            data,
            settings_of(settings, options),
            output,
            plan_file=plan_file,
            eval_data=eval_data,
            progress=callback,
            stop=stop,
        )


def int8(
    model: ModelSource | Result,
    data: Source | None = None,
    output: File | None = None,
    settings: Settings | None = None,
    eval_data: Source | None = None,
    *,
    progress: ShownProgress = None,
    **options: Any,
) -> Quantised:
    """Quantise a model to int8 by ONNX Runtime.

    Args:
        model: Model, pruned or not: a file, in memory, or the result of ``prune``.
        data: Calibration samples, as for ``prune``; only ``ranges="dynamic"`` does without. What ``prune`` holds out
            is left out here too.
        output: File to write. Default: the result stays in memory.
        settings: Reading of the data, batch size and seed.
        eval_data: Held-out samples; with them, all of ``data`` calibrate.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.
        **options: ``ranges``, ``calibration``, ``per_tensor``, ``keep_float`` and ``reduce_range``, as the options of
            the command ``int8``, and settings by name, which take precedence over ``settings``.

    Returns:
        The quantised model. What it loses is measured by ``verify``.

    Raises:
        OamipError: Bad input, or a model that ONNX Runtime cannot quantise. No file is written.
    """
    names = QuantisationOptions.model_fields
    own = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    with shown(progress) as callback:
        return quantisation.int8(
            model.model if isinstance(model, Result) else model,
            data,
            output,
            settings_of(settings, others),
            QuantisationOptions.create(**own),
            eval_data=eval_data,
            progress=callback,
        )


def run(
    pipeline: File | Mapping[str, Any],
    *,
    again: bool = False,
    progress: ShownProgress = None,
) -> StagedRun:
    """Run the stages ``prune``, ``recover`` and ``int8``, and measure every model against the original.

    Args:
        pipeline: TOML file of the command ``run``, or its content as a mapping, with underscores in names:
            ``{"model": ..., "data": ..., "folder": ..., "prune": {"macs": 0.5}, "int8": {}}``. In a mapping, data may
            be in memory, as for ``prune``.
        again: Run every stage. Default: those are left out whose inputs and settings are unchanged since the last run
            in the same folder.
        progress: True for bars, or a function that is called as ``progress(stage, done, total)``.

    Returns:
        Size, latency and quality of the model of every stage, and the limits that are broken.

    Raises:
        OamipError: Bad input or a missing package. Finished stages stay in the folder.
        BudgetNotMet: The budget of the stage ``prune`` cannot be met.
        GateFailed: The result of a stage failed a check.
    """
    given = run_file.describe(pipeline)
    with shown(progress) as callback:
        return staged_run.run(given, again=again, progress=callback)
