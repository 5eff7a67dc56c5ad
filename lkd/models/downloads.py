"""Access to pretrained weights of other libraries: find cached files, and fail early without a network connection.

Without a connection, torch.hub and huggingface_hub retry for up to a minute.
"""

from __future__ import annotations

import socket
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch


def unreachable(url: str, timeout: float = 1.0) -> str:
    """Try once to connect to a server, or to its proxy.

    Args:
        url: URL of the server.
        timeout: Timeout in seconds.

    Returns:
        Reason why the connection failed; empty if it succeeded.
    """
    address = urlsplit(url)
    proxies = {} if proxy_bypass(address.hostname or "") else getproxies()
    if proxy := proxies.get(address.scheme) or proxies.get("all"):
        address = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    host, port = address.hostname or "", address.port or (80 if address.scheme in ("http", "") else 443)
    reason = [f"no response from {host} within {timeout:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout).close()
            reason[0] = ""
        except OSError as error:
            reason[0] = f"{host}: {error.strerror or error}"

    thread = Thread(target=connect, daemon=True)  # since name resolution has no timeout
    thread.start()
    thread.join(timeout)
    return reason[0]


def hub_file(url: str) -> Path:
    """Return the path at which torch.hub stores a downloaded file.

    Args:
        url: URL of the file.
    """
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def timm_weights(name: str, remedy: str = "pretrained to false") -> dict[str, Any]:
    """Find the pretrained weights of a timm network in the Hugging Face cache.

    Args:
        name: Name of the network, as in `timm.create_model`.
        remedy: Setting that avoids the weights, for the error message.

    Returns:
        Settings that make timm read the cached file instead of querying the server for a newer one; empty if timm
        should download the weights.

    Raises:
        FileNotFoundError: If the weights are not cached and cannot be downloaded.
    """
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    known = None if ":" in name else timm.get_pretrained_cfg(name)
    if name.startswith("local-dir:") or (known is not None and not known.hf_hub_id):
        return {}
    repository = str(known.hf_hub_id if known is not None else name.partition(":")[2])
    for file in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(path := try_to_load_from_cache(repository, file), str):
            return {} if known is None else {"file": path, "custom_load": False}
    if constants.HF_HUB_OFFLINE or not (reason := unreachable(constants.ENDPOINT)):
        return {}
    raise FileNotFoundError(_not_cached(f"timm's {name}", repository, reason, remedy))


def check_hub_weights(owner: str, repository: str, revision: str, remedy: str) -> None:
    """Check that weights in a repository of the Hugging Face hub are cached or can be downloaded.

    Args:
        owner: Name of the weights' owner, for the error message.
        repository: Name of the repository.
        revision: Revision of the repository.
        remedy: Setting that avoids the weights, for the error message.

    Raises:
        FileNotFoundError: If the weights are not cached and cannot be downloaded.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, "model.safetensors", revision=revision)
    if not isinstance(cached, str) and (reason := unreachable(constants.ENDPOINT)):
        raise FileNotFoundError(_not_cached(owner, f"{repository} --revision {revision}", reason, remedy))


def _not_cached(owner: str, repository: str, reason: str, remedy: str) -> str:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.split()[0].replace('/', '--')}"
    return (
        f"the pretrained weights of {owner} are not cached and could not be downloaded ({reason}); run `hf download "
        f"{repository}` on a machine with a connection and copy its folder to {folder}, or set {remedy}"
    )
