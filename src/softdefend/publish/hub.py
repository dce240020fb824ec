"""Models on the Hugging Face hub, or in a folder of the same form: put there, and loaded from there."""

from __future__ import annotations

import logging
from pathlib import Path

import huggingface_hub
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.hints import check_type
from softdefend.core.version import VERSION
from softdefend.publish.download import check_address, locate
from softdefend.publish.folder import open_network, open_publication, write_published

_log = logging.getLogger(__name__)

WHICH = ("best", "last")


def from_pretrained(
    model: str | Path, *, revision: str | None = None, net: nn.Module | None = None
) -> nn.Module:
    """A published network with its weights, in eval mode on the CPU.

    Nothing that was downloaded is executed. Files are compared with the hashes that the hub gives, and the
    weights with the digest in the model's configuration.

    Args:
        model: ``owner/name`` on the hub, or a folder that ``softdefend push`` wrote.
        revision: branch, tag or commit on the hub.
        net: takes the weights; needed where the network is neither built in nor timm's.

    Returns:
        ``net``, or a :class:`~softdefend.publish.network.RobustClassifier`: images [b, c, h, w] float32 in
        [0, 1] to logits [b, k].

    Raises:
        SettingError: no such model, files that are damaged or altered, or a network that does not fit.
    """
    check_type("net", net, nn.Module | None)
    source = check_type("model", model, str | Path)
    return open_network(locate(source, revision=revision), net)


def push(
    run: Path,
    address: str,
    *,
    which: str = "best",
    output: Path | None = None,
    license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> tuple[list[Path], str | None]:
    """Write a checkpoint of a run as a model others can load, and upload it.

    Args:
        run: the run folder.
        address: ``owner/name`` on the hub.
        which: best or last.
        output: the folder that is written and uploaded; ``hub`` in the run folder if None.
        license: of the weights, as the hub spells it.
        private: whether a new repository is seen by its owner only.
        dry_run: write the folder, and upload nothing.

    Returns:
        The files, and the address of the commit; None in a dry run.

    Raises:
        SettingError: a run that cannot be published, or any reason for which the upload failed.
    """
    check_address(address)
    if which not in WHICH:
        raise SettingError("--which", repr(which), " or ".join(WHICH))
    folder = output or run / "hub"
    files = write_published(open_publication(run, which), folder, address, license)
    return files, None if dry_run else _upload(files, folder, address, private)


def _upload(files: list[Path], folder: Path, address: str, private: bool) -> str:
    api = huggingface_hub.HfApi(library_name="softdefend", library_version=VERSION)
    try:
        api.create_repo(address, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=address,
            folder_path=folder,
            allow_patterns=[path.name for path in files],
            commit_message="Publish with softdefend",
        )
    except Exception as error:  # the client's own errors and those of its HTTP library share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        accepted = "a repository that you may write to (hf auth login), or --dry_run"
        raise SettingError("address", f"{address} ({reason})", accepted) from None
    return str(commit.commit_url)
