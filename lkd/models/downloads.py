"""Trained weights of other libraries: found where these keep them, or refused at once where nothing can be downloaded.

Without a connection, torch.hub and huggingface_hub try again for up to a minute.
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
    """Tries once to connect to a server, or to the proxy that stands before it.

    Args:
        url: Any address of the server.
        timeout: How long to try, in seconds.

    Returns:
        Why there is no connection; empty if there is one.
    """
    address = urlsplit(url)
    proxies = {} if proxy_bypass(address.hostname or "") else getproxies()
    if proxy := proxies.get(address.scheme) or proxies.get("all"):
        address = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    host, port = address.hostname or "", address.port or (80 if address.scheme in ("http", "") else 443)
    reason = [f"{host} does not answer within {timeout:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout).close()
            reason[0] = ""
        except OSError as error:
            reason[0] = f"{host}: {error.strerror or error}"

    thread = Thread(target=connect, daemon=True)  # as nothing limits how long a name is looked up
    thread.start()
    thread.join(timeout)
    return reason[0]


def hub_file(url: str) -> Path:
    """Where torch.hub keeps a file that it downloads.

    Args:
        url: The file's address.
    """
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def timm_weights(name: str) -> dict[str, Any]:
    """Finds the trained weights of one of timm's networks in Hugging Face's cache.

    Args:
        name: What `timm.create_model` gets.

    Returns:
        How timm is told to read the file, instead of asking the server for a newer one; empty where it downloads it.

    Raises:
        FileNotFoundError: If the weights are not in the cache, and there is no connection.
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
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    raise FileNotFoundError(
        f"the trained weights of timm's {name} are not here and could not be downloaded ({reason}); run `hf download "
        f"{repository}` where there is a connection and copy its folder to {folder}, or set pretrained to false"
    )
