"""Prunes trained ONNX models to a budget, without retraining, and verifies the result.

The main functions are ``inspect``; ``prune`` and its stages ``score``, ``plan`` and ``apply``; ``frontier`` for several
budgets; ``verify`` for two models; ``recover`` and ``int8`` for what follows, and ``run`` for all stages of a file;
``pack`` and ``unpack`` for storage. Models and data may be files or in memory.
Results are frozen records, and every intended error is an ``OamipError``. Names are imported when first used, so
``import onnx_oamip`` is fast.

>>> import onnx_oamip
>>> result = onnx_oamip.prune("models/lenet300-mnist.onnx", "models/mnist.npz", macs=0.5, importance="activation")
>>> len(result.model.graph.output), result.report.after.macs <= 0.5 * result.report.before.macs
(1, True)

Quantised to int8 on the same samples, and compared with the original:

>>> quantised = onnx_oamip.int8(result, "models/mnist.npz")
>>> found = onnx_oamip.verify("models/lenet300-mnist.onnx", quantised.model, "models/mnist.npz")
>>> quantised.bytes < result.report.after.bytes, found.accuracy_after > 0.97
(True, True)

With a file to write, all stages at once, and a callback ``progress(stage, done, total)``:

>>> stages = set()
>>> report = onnx_oamip.prune(
...     "models/lenet300-mnist.onnx", "models/mnist.npz", "half.onnx",
...     onnx_oamip.Settings(macs=0.5, importance="activation", force=True),
...     progress=lambda stage, done, total: stages.add(stage),
... )
>>> report.after.macs <= 0.5 * report.before.macs, report.verification.accuracy_after > 0.97
(True, True)
>>> sorted(stages)
['calibrate', 'gram', 'refit', 'sensitivity', 'verify']
>>> {group.name for group in report.coupling.groups} == {"fc1.weight", "fc2.weight"}
True

Or stage by stage, with files in between that can be kept, read and edited:

>>> settings = onnx_oamip.Settings(macs=0.3, force=True)
>>> scored = onnx_oamip.score("models/lenet300-mnist.onnx", "models/mnist.npz", "scores.npz", settings)
>>> planned = onnx_oamip.plan(
...     "models/lenet300-mnist.onnx", "models/mnist.npz", "plan.json", settings, scores="scores.npz"
... )
>>> report = onnx_oamip.apply(
...     "models/lenet300-mnist.onnx", "plan.json", "models/mnist.npz", "small.onnx", {"force": True}
... )
>>> report.after.macs == planned.plan.predicted.macs
True

Errors are one sentence:

>>> onnx_oamip.prune("models/lenet300-mnist.onnx", None, None, onnx_oamip.Settings(macs=0.5))
Traceback (most recent call last):
onnx_oamip.core.errors.DataError: `importance=obs` needs calibration data; give `data`, or use `importance=l2`,
`allocate=uniform` and `refit=none`.
"""

from onnx_oamip.core.lazy_names import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
