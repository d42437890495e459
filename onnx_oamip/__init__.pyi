"""Public names of the package; ``__init__.py`` imports each from here when it is first used."""

from onnx_oamip.api.comparison import compare as compare
from onnx_oamip.api.in_memory import (
    Feeds as Feeds,
    apply as apply,
    feeds as feeds,
    frontier as frontier,
    inspect as inspect,
    plan as plan,
    prune as prune,
    score as score,
    verify as verify,
)
from onnx_oamip.api.quantisation import Quantised as Quantised
from onnx_oamip.api.results import (
    Inspection as Inspection,
    Result as Result,
)
from onnx_oamip.api.staged_run import StagedRun as StagedRun
from onnx_oamip.api.stages import (
    int8 as int8,
    recover as recover,
    run as run,
)
from onnx_oamip.artifacts.plan_files import Planned as Planned
from onnx_oamip.artifacts.plan_schema import PlanFile as PlanFile
from onnx_oamip.artifacts.recovered_models import Recovered as Recovered
from onnx_oamip.artifacts.score_files import (
    Scored as Scored,
    load_scores as load_scores,
)
from onnx_oamip.core.errors import (
    BudgetNotMet as BudgetNotMet,
    DataError as DataError,
    EnvironmentMissing as EnvironmentMissing,
    GateFailed as GateFailed,
    ModelError as ModelError,
    OamipError as OamipError,
    OutputError as OutputError,
    SettingsError as SettingsError,
)
from onnx_oamip.core.records import (
    Budget as Budget,
    Cost as Cost,
    Coupling as Coupling,
    Group as Group,
    Model as Model,
    Pinned as Pinned,
    Plan as Plan,
    Pruned as Pruned,
    Recovery as Recovery,
    Report as Report,
    Request as Request,
    Scores as Scores,
    Statistics as Statistics,
    Verification as Verification,
)
from onnx_oamip.core.settings import Settings as Settings
from onnx_oamip.core.version import __version__ as __version__
from onnx_oamip.graph.coupling import couple as couple
from onnx_oamip.graph.loading import load as load
from onnx_oamip.importance import (
    Method as Method,
    register as register,
)
from onnx_oamip.published.packing import (
    Packed as Packed,
    Unpacked as Unpacked,
    pack as pack,
    unpack as unpack,
)
from onnx_oamip.reporting.documents import document as document
from onnx_oamip.statistics.requests import (
    CLASS_SAMPLES as CLASS_SAMPLES,
    COVARIANCE as COVARIANCE,
    MOMENTS as MOMENTS,
)
