"""Where a logger keeps the files of one run."""

import os
from typing import Any


def run_folder(logger: Any) -> str | None:
    """The folder of the logger's run and of no other, a path or a URL; ``None`` where it has none.

    TensorBoard and CSV have a ``log_dir``; W&B the ``dir`` of its run, whose files it uploads; MLflow the run's artifacts.
    Of any other logger it is ``save_dir/name/version``, which is where ``ModelCheckpoint`` puts its files too.
    """
    experiment = getattr(logger, "experiment", None)
    for folder in (getattr(logger, "log_dir", None), getattr(experiment, "dir", None), _artifacts(logger, experiment)):
        if isinstance(folder, str | os.PathLike):
            return os.fspath(folder)
    save_dir = getattr(logger, "save_dir", None)
    if save_dir is None:
        return None
    version = logger.version if isinstance(logger.version, str) or logger.version is None else f"version_{logger.version}"
    return os.path.join(save_dir, *(str(part) for part in (logger.name, version) if part is not None))


def _artifacts(logger: Any, client: Any) -> Any:
    """The artifacts of an MLflow run, which its page shows; MLflow's database holds no other files."""
    if not (hasattr(client, "get_run") and hasattr(client, "log_artifact")):
        return None
    return getattr(getattr(client.get_run(logger.version), "info", None), "artifact_uri", None)
