"""The passwords, tokens and keys of one start: made here, handed to the processes by environment, shown to nobody.

None stands on a command line, where every user of the machine could read it. Knows no process and no port.
"""

import secrets
from dataclasses import dataclass, field

_BYTES = 24


def _made() -> str:
    return secrets.token_urlsafe(_BYTES)


@dataclass(frozen=True)
class Credentials:
    """One credential per door, all different. The S3 access key id is the S3 server's to name."""

    postgres: str = field(default_factory=_made, repr=False)
    """Of the database's superuser."""

    prefect_database: str = field(default_factory=_made, repr=False)
    mlflow_database: str = field(default_factory=_made, repr=False)
    studies_database: str = field(default_factory=_made, repr=False)
    prefect_api: str = field(default_factory=_made, repr=False)
    mlflow_admin: str = field(default_factory=_made, repr=False)
    mlflow_session: str = field(default_factory=_made, repr=False)
    """Signs the MLflow page's cookies."""

    s3_secret: str = field(default_factory=_made, repr=False)
    ray: str = field(default_factory=_made, repr=False)
    votes: str = field(default_factory=_made, repr=False)

    @property
    def prefect_auth(self) -> str:
        """What Prefect's server and clients call their auth string."""
        return f"qlora:{self.prefect_api}"

    def all(self) -> dict[str, str]:
        """Each by its name: what must be found in no log, artifact, field or report."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
