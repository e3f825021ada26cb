"""Model configurations: the JSON files of MLPerf v0.7 and DeepSparkHub."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import typed

FOLDER = Path(__file__).parent / "configs"
INTERACTIONS = ("dot", "cat", "dcnv2")
LARGEST = 2**31 - 1  # of a size: ids are int32


class ConfigError(ValueError):
    """Bad settings or model files. The message says what was expected, what came, and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a DLRM; the fields are the JSON keys.

    bottom_mlp_sizes: outputs of its layers, the last one equal to embedding_dim; top_mlp_sizes: the last one is 1.
    interaction_op: "dot", "cat" or "dcnv2". self_interaction: keep the diagonal of the dot products. hash_indices: take
    ids modulo their table's size instead of refusing ids beyond it. dcn_num_layers, dcn_low_rank_dim: of "dcnv2", under
    the names of torchrec's flags; defaults are MLPerf v3's.
    """

    __pydantic_config__ = typed.STRICT

    num_numerical_features: int
    categorical_feature_sizes: tuple[int, ...]
    bottom_mlp_sizes: tuple[int, ...]
    top_mlp_sizes: tuple[int, ...]
    embedding_dim: int
    interaction_op: str = "dot"
    hash_indices: bool = False
    self_interaction: bool = False
    dcn_num_layers: int = 3
    dcn_low_rank_dim: int = 512

    def __post_init__(self):
        for field in ("categorical_feature_sizes", "bottom_mlp_sizes", "top_mlp_sizes"):
            sizes = getattr(self, field)
            if not sizes or not all(1 <= size <= LARGEST for size in sizes):
                raise ConfigError(f"{field}: expected whole numbers from 1 to {LARGEST}, got {sizes}")
        for field in ("num_numerical_features", "embedding_dim", "dcn_num_layers", "dcn_low_rank_dim"):
            if not 1 <= getattr(self, field) <= LARGEST:
                raise ConfigError(f"{field}: expected 1 to {LARGEST}, got {getattr(self, field)}")
        if self.bottom_mlp_sizes[-1] != self.embedding_dim:
            raise ConfigError(
                f"bottom_mlp_sizes ends in {self.bottom_mlp_sizes[-1]}: expected embedding_dim, {self.embedding_dim}"
            )
        if self.top_mlp_sizes[-1] != 1:
            raise ConfigError(f"top_mlp_sizes ends in {self.top_mlp_sizes[-1]}: expected 1, the logit")
        if self.interaction_op not in INTERACTIONS:
            raise ConfigError(f"interaction_op: expected one of {', '.join(INTERACTIONS)}, got {self.interaction_op!r}")

    def with_tables(self, sizes: list[int]) -> "ModelConfig":
        """The same model with other table sizes."""
        return replace(self, categorical_feature_sizes=tuple(sizes))

    def to_json(self) -> dict:
        """The JSON object that from_json reads."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict, where: str) -> "ModelConfig":
        """Build from a JSON object. Raises ConfigError for missing or unknown keys, other types and bad sizes, naming
        `where`."""
        return typed.read(ModelConfig, values, where, ConfigError)

    def check_columns(self, dense: int, tables: int, where: str) -> None:
        """Raise ConfigError, naming `where`, where a data set of so many dense and category columns does not fit."""
        if self.num_numerical_features != dense:
            raise ConfigError(
                f"{where}: num_numerical_features: expected {dense}, as the data set has, got "
                f"{self.num_numerical_features}"
            )
        if len(self.categorical_feature_sizes) != tables:
            raise ConfigError(
                f"{where}: categorical_feature_sizes: expected {tables} tables, one a category column of the data set, "
                f"got {len(self.categorical_feature_sizes)}"
            )


def names() -> list[str]:
    """Names of the configurations that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_config(name: str) -> tuple[ModelConfig, Path]:
    """The configuration in file `name`, or else the one that comes with the project under that file's name.

    So `dlrm/config/official_config.json`, as in the commands of other repositories, and plain `official_config` both
    work. Returns it with the path it was read from. Raises ConfigError where there is none.
    """
    path = Path(name)
    if not path.is_file():
        path = FOLDER / f"{path.name.removesuffix('.json')}.json"
    if not path.is_file():
        raise ConfigError(f"--model_config {name}: no such file; the ones that come along are {', '.join(names())}")
    return typed.read_json(ModelConfig, path.read_bytes(), str(path), ConfigError), path
