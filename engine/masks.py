"""Keys in URIs are for opening what they name: nothing that is shown or written has them.

s3://KEY:SECRET@bucket, https://user:password@host, and the credentials in a query (?secret_key=, a signed address).
"""

from __future__ import annotations

import re

USER = r"(://)[^/\s?#'\"\\<>]*@"
"""What stands before the host."""
S3_USER = r"(s3a?://)[^/\s:@'\"\\<>]+:[^\s@'\"\\<>]*@"
"""The same where the secret has a `/`, as Amazon's may, and nobody wrote %2F for it."""
PARAMETER = (
    r"([?&;](?:[\w.-]*(?:access_?key|secret|token|passw(?:or)?d|signature|credential|api_?key|account_?key)[\w.-]*|sig)=)"
    r"[^&;#\s'\"\\<>]*"
)
KEYS = re.compile(f"(?i){USER}|{S3_USER}")
URI = re.compile(r"://[^\s'\"\\<>]*")
PARAMETERS = re.compile(f"(?i){PARAMETER}")
MAY_HAVE_KEYS = f"(?i)(?:{USER}|{S3_USER}|://.*{PARAMETER})"
"""What matches texts that `masked` changes, and a few others; Arrow understands it, too."""


def masked(text: str) -> str:
    """Return a text with *** for the keys of every URI in it; masking it again changes nothing."""
    if "://" not in text:
        return text
    text = KEYS.sub(lambda found: f"{found[1] or found[2]}***@", text)
    return URI.sub(lambda found: PARAMETERS.sub(r"\1***", found[0]), text)
