"""Which errors are the network's: not all of them are an `OSError`."""

from __future__ import annotations


__all__ = ["is_of_network", "lost_connection"]

# How the names of packages begin that open files on the network.
CLIENTS = ("aiohttp", "botocore", "gcsfs", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")


def is_of_network(error: BaseException) -> bool:
    """Whether an error while reading may be the network's."""
    return isinstance(error, OSError) or _is_of_client(error)


def lost_connection(error: BaseException | None) -> BaseException | None:
    """The error of a connection that broke among the causes of an error. One that could not be made is none, nor is the answer of a
    server, unless it says that the server failed."""
    while error is not None:
        is_of_hub = type(error).__module__.startswith("huggingface_hub")  # not found, or switched off
        is_answer = getattr(error, "response", None) is not None or getattr(error, "status", 500) < 500
        never_made = "Connect" in type(error).__name__ and "Disconnect" not in type(error).__name__
        if _is_of_client(error) and not (is_of_hub or is_answer or never_made):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_of_client(error: BaseException) -> bool:
    return any(cls.__module__.startswith(CLIENTS) for cls in type(error).__mro__)
