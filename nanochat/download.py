"""Bring one file by HTTPS: resumed where it broke off, verified, retried, with the hub's token.

    reason = download(f"{hub_endpoint()}/datasets/...", path, threading.Event())

The bytes go to `path` with ".part" behind its name, and only a file of the right length and hash is
renamed. HF_ENDPOINT names a mirror to download from, HF_TOKEN is sent with every request to it and
to no other host.
"""
import os
import re
import zipfile
import zlib
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, print0, sha256

BACKOFF_SECONDS = 1.0       # before the second attempt, then doubled
ATTEMPTS = 5
DAMAGED_ATTEMPTS = 2        # a file that came damaged is fetched once more
LONGEST_WAIT = 300          # seconds; a server may ask to wait longer, which is not done
TOLD_WAIT = 2               # seconds; a longer wait is said
FINAL = (401, 403, 404)     # statuses that another attempt would get again
TIMEOUT = 30                # seconds without a byte
BLOCK_BYTES = 1 << 16
HUB = "https://huggingface.co"


class Damaged(OSError):
    """A file came whole, but its length, hash or content is wrong."""


def hub_endpoint():
    """The address of the hub or of its mirror, without a slash at the end."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or HUB
    try:
        parts = urlsplit(endpoint)
    except ValueError:  # brackets that hold no IPv6 address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"HF_ENDPOINT={endpoint} is no address: it begins with https://")
    if "@" in parts.netloc:
        raise UserError("HF_ENDPOINT must hold no password, which messages would show: a mirror "
                        "that wants a token gets HF_TOKEN")
    return endpoint


def hub_token():
    """What HF_TOKEN holds, "" where it is not set. UserError, which does not show it, where it is
    none."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise UserError("HF_TOKEN must be printable ASCII without spaces")
    return token


def authorize(request):
    """Add HF_TOKEN to a request. (As a header of requests.get, ~/.netrc would replace it.)

    Where a reply leads to another host, requests removes it again.
    """
    token = hub_token()
    if token:
        request.headers["Authorization"] = f"Bearer {token}"
    return request


# ----------------------------------------------------------------------------------------------
# one attempt

def parquet_problem(path):
    """Why a file is no parquet file, as one line, or ""."""
    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        return " ".join(str(error).split())
    return ""


def zip_problem(path):
    """Why a file is no zip file, as one line, or ""."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        return " ".join(str(error).split())
    return f"{damaged} in it is damaged" if damaged else ""


def fetch(
    url, part, stop, wanted_sha256=None, progress=None, check=parquet_problem, auth=authorize,
):
    """One attempt to bring `url` to the file `part`, continuing what is there.

    wanted_sha256: the hash of the file, or None: then what the reply tells, if it does.
    progress: called with (bytes that are there, bytes of the file or None) after every block.
    check: what says why a file that came whole is wrong, or "". auth: None for a host other than
    the hub, which must not see its token.
    Raises requests.RequestException (an OSError) where the attempt failed, and Damaged, which has
    removed the file, where it brought something else.
    """
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"

    options = {"headers": headers, "auth": auth, "stream": True, "timeout": TIMEOUT}
    with requests.get(url, **options) as reply:
        if reply.status_code == 416:  # nothing follows what we have, which was not accepted
            part.unlink()
        reply.raise_for_status()
        continued = reply.status_code == 206
        length = _full_length(reply)
        with open(part, "ab" if continued else "wb") as file:
            for block in reply.iter_content(BLOCK_BYTES):
                file.write(block)
                if progress:
                    progress(file.tell(), length)
                if stop.is_set():
                    raise requests.RequestException("interrupted")
        wanted_sha256 = wanted_sha256 or _told_sha256(reply)

    # a short file is kept: the next attempt continues it
    size = part.stat().st_size
    if length is not None and size < length:
        raise requests.RequestException(f"{size} bytes of {length} came")

    # a damaged file is not worth continuing
    problem = _problem_of(part, length, wanted_sha256, check)
    if problem:
        part.unlink()
        raise Damaged(f"the file is damaged: {problem}")


def _full_length(reply):
    """Bytes of the whole file, even where a reply brings only its rest; None where not told."""
    if reply.status_code == 206:
        length = reply.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        length = reply.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _told_sha256(reply):
    """The hash of the file as the hub tells it, or None: its tag of a large file is the sha256."""
    for hop in (*reply.history, reply):
        tag = hop.headers.get("X-Linked-Etag", "").strip('"')
        if len(tag) == 64:
            return tag
    return None


def _problem_of(part, length, wanted_sha256, check):
    """What is wrong with a file that came whole, or ""."""
    if length is not None and part.stat().st_size != length:
        return "the length is wrong"
    if wanted_sha256 is not None and sha256(part) != wanted_sha256:
        return "the hash is wrong"
    return check(part)


# ----------------------------------------------------------------------------------------------
# attempts

def download(url, path, stop, *settings, **more):
    """As bring(), but returns None, or a line that says why it failed."""
    import requests

    try:
        bring(url, path, stop, *settings, **more)
    except (requests.RequestException, Damaged) as error:
        return reason_of(error)
    return None


def bring(
    url, path, stop, wanted_sha256=None, progress=None, check=parquet_problem, auth=authorize,
):
    """Fetch `url` to `path` with retries.

    stop: a threading.Event that ends the download early. Others, and what is raised: as in fetch().
    """
    part = path.with_name(path.name + ".part")

    def have():
        return part.stat().st_size if part.exists() else 0

    with_retries(lambda: fetch(url, part, stop, wanted_sha256, progress, check, auth), stop, have)
    os.replace(part, path)


def with_retries(attempt, stop, have=lambda: 0):
    """What attempt() returns, once it succeeds; after the last attempt its error is raised.

    Up to ATTEMPTS times, with pauses that double, or as long as the server asks for. What another
    attempt would not change (no access, not there, damaged again) is final.

    have: returns the bytes that are there. An attempt that brought more of them is the first one
    again, for a connection may drop often before a large file is there.
    """
    import requests

    damaged = 0
    number = 0
    most = have()
    while True:
        number += 1
        try:
            return attempt()
        except (requests.RequestException, Damaged) as error:
            if have() > most:
                number = 1
                most = have()
            damaged += isinstance(error, Damaged)
            wait = max(BACKOFF_SECONDS * 2 ** (number - 1), _wanted_wait(error))
            is_final = status_of(error) in FINAL or damaged == DAMAGED_ATTEMPTS
            is_last = number == ATTEMPTS or wait > LONGEST_WAIT
            if is_final or is_last or stop.is_set():
                raise
            if wait > TOLD_WAIT:
                print0(f"{reason_of(error)}: next attempt in {wait:.0f} s")
        stop.wait(wait)


def status_of(error):
    """The HTTP status behind an error, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason_of(error):
    """An error in one line, without the signature of a temporary address."""
    import requests

    reason = re.sub(r"\?\S+", "", " ".join(str(error).split()))
    request = getattr(error, "request", None)
    if isinstance(error, requests.ConnectionError) and request is not None:
        reason = f"no connection to {urlsplit(request.url).netloc}"
        if isinstance(error, requests.exceptions.SSLError):
            reason += ", whose certificate is not trusted (REQUESTS_CA_BUNDLE names your own)"
        if isinstance(error, requests.exceptions.ProxyError):
            reason += " through the proxy of HTTPS_PROXY"
    if status_of(error) in (401, 403):
        reason += " (HF_TOKEN holds the token)"
    if status_of(error) == 429:
        reason += " (wait some minutes, or set HF_TOKEN: the hub gives more to those it knows)"
    return reason


def _wanted_wait(error):
    """Seconds that a reply asks to wait (Retry-After, RFC 9110), 0 where it does not say.

    Its other form, a date, is left to the pauses that double.
    """
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "")
    return int(value) if value.isdecimal() else 0
