"""Start the whole system on this machine's loopback interface, and end it with Ctrl-C.

    python -m infra.loopback                 # in a folder of its own, removed at the end
    python -m infra.loopback --dir /srv/try  # logs stay there
    source DIR/stack.env                     # in another shell: `qlora` and `prefect` now use it

Postgres of the system's packages, an S3 server, Prefect's and MLflow's servers on both, a Ray head, the vote page and a
Prefect worker. Databases and objects live as long as the stack does.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO

from infra.loopback import postgres
from infra.loopback.keeper import Keeper, StopRequestedError, run_kept
from infra.loopback.layout import Layout
from infra.loopback.service import StackError

_SAMPLE_PAIRS = Path(__file__).with_name("pairs.jsonl")


def main() -> int:
    """Run until interrupted: 0; 1 when something could not start or ended by itself."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, help="a new or empty folder, kept at the end; default: a temporary one")
    parser.add_argument("--pairs", type=Path, default=_SAMPLE_PAIRS, help="what the vote page shows")
    options = parser.parse_args()
    folder = options.dir or Path(tempfile.mkdtemp(prefix="qlora-stack-"))
    try:
        prepare_folder(folder.absolute())
        return run_kept(lambda lifeline: serve(Layout.make(folder.absolute(), options.pairs.absolute()), lifeline))
    except StackError as error:
        _say(str(error))
        return 1
    finally:
        if options.dir is None:
            shutil.rmtree(folder, ignore_errors=True)


def prepare_folder(folder: Path) -> None:
    """Make the folder, private but for the way through it to the database's own. StackError for one in use."""
    os.umask(0o077)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise StackError(f"{folder} is not empty; name a new folder, for every start begins with empty databases")
    folder.chmod(0o711 if postgres.server_user() else 0o700)
    (folder / "logs").mkdir()


def serve(layout: Layout, lifeline: IO[bytes]) -> int:
    """The keeper's work: start everything, say how to use it, and keep it until the front is gone."""
    keeper = Keeper(layout.logs, lifeline)
    try:
        postgres.make_cluster(layout.folder / "postgres", layout.credentials.postgres)
        keeper.start(layout.stores())
        postgres.make_databases(layout.ports["postgres"], layout.credentials.postgres, layout.databases())
        keeper.start([layout.cluster()])
        keeper.start(layout.servers())
        keeper.start([layout.worker()])
        announce(layout)
        keeper.watch()
    except StopRequestedError:
        _say("ending the stack")
    except StackError as error:
        _say(str(error))
        return 1
    finally:
        keeper.stop()
    return 0


def announce(layout: Layout) -> None:
    """Write the clients' environment, for its owner's eyes, and say on standard output that all is ready."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in layout.client_environment().items()]
    environment = layout.folder / "stack.env"
    environment.write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = {"dir": str(layout.folder), "env": str(environment), "ports": layout.ports, "settings": layout.config()}
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
    sets = " ".join(f"--set {name}={value}" for name, value in layout.config().items())
    _say(f"ready. In another shell:\n\n  source {environment}\n  qlora run pipeline.yaml {sets}\n\nCtrl-C ends it.")


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
