"""Start a team's MLflow server: PostgreSQL behind it, files on S3 through it, nobody in unasked.

Everything it needs to know is in the environment, where Fargate, Kubernetes or a shell put it;
nothing secret is on a command line, where `ps` would show it::

    PGHOST PGPORT PGDATABASE PGUSER PGPASSWORD PGSSLMODE    the database, by libpq's own names
    MLFLOW_ARTIFACTS                     where files go: s3://BUCKET/FOLDER
    MLFLOW_SERVER_ALLOWED_HOSTS          names under which it is called, with port, comma between
    MLFLOW_SERVER_CORS_ALLOWED_ORIGINS   pages that may call it, as http://NAME:PORT
    MLFLOW_FLASK_SERVER_SECRET_KEY       signs its cookies
    MLFLOW_AUTH_ADMIN_PASSWORD           of the user admin
    MLFLOW_JOBS_PASSWORD                 of the user jobs, who sees its own experiments only
    MLFLOW_HOST MLFLOW_PORT              where it listens; 0.0.0.0 and 5000 when not given

A password that has changed is given to its user at the next start; MLflow by itself takes the
administrator's once, and never again. Without all of them, or with one that is known to the world,
the server does not start.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from droppos.errors import ConfigError

DATABASE = "postgresql+psycopg2://"
"""libpq finds the rest in PG* variables."""
SETTINGS = Path(__file__).with_name("basic_auth.ini")

LENGTHS = {
    "MLFLOW_AUTH_ADMIN_PASSWORD": 16,
    "MLFLOW_JOBS_PASSWORD": 16,
    "MLFLOW_FLASK_SERVER_SECRET_KEY": 32,
    "PGPASSWORD": 16,
}
"""Characters that each secret has at least; 16 random ones are not guessed over a network."""
REQUIRED = (
    *("PGHOST", "PGDATABASE", "PGUSER", "MLFLOW_ARTIFACTS"),
    *("MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"),
)
KNOWN_TO_THE_WORLD = ("password", "changeme", "mlflow", "admin", "secret", "12345678")
"""What default and example passwords are made of; MLflow's own was password1234."""


def complaints(environment: Mapping[str, str]) -> list[str]:
    """Tell what is missing or unsafe, without the values of secrets."""
    found = [f"{name} is not set" for name in (*REQUIRED, *LENGTHS) if not environment.get(name)]
    for name, length in LENGTHS.items():
        secret = environment.get(name, "")
        if secret and len(secret) < length:
            found.append(f"{name} has {len(secret)} characters, expected at least {length}")
        if any(word in secret.lower() for word in KNOWN_TO_THE_WORLD):
            found.append(f"{name} has a word of default passwords in it; make up a random one")
    for name in ("MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"):
        if "*" in environment.get(name, ""):
            found.append(
                f"{name} is {environment[name]}; expected names, since * lets every web page that "
                "a user visits call this server"
            )
    artifacts = environment.get("MLFLOW_ARTIFACTS")
    if artifacts and not artifacts.startswith("s3://"):
        found.append(f"MLFLOW_ARTIFACTS is {artifacts}, expected s3://BUCKET/FOLDER")
    return found


def give_passwords(passwords: Mapping[str, str]) -> None:
    """Make the users that are not there, and give each the password it should have.

    Args:
        passwords: By user; `admin` is the administrator.
    """
    # Here, since MLflow reads its settings from the environment when it is imported, and takes ten
    # seconds over it, which a wrong setting need not wait for.
    from mlflow.server.auth import store

    store.init_db(DATABASE)
    for user, password in passwords.items():
        if not store.has_user(user):
            store.create_user(user, password, is_admin=user == "admin")
        elif not store.authenticate_user(user, password):
            store.update_user(user, password=password)
    store.engine.dispose()


def arguments(environment: Mapping[str, str]) -> list[str]:
    """What is told to `mlflow`; MLflow hands it on to its processes, so it holds no secret."""
    return [
        *("server", "--app-name", "basic-auth"),
        *("--host", environment.get("MLFLOW_HOST", "0.0.0.0")),
        *("--port", environment.get("MLFLOW_PORT", "5000")),
        # One process: 515 MB. Job execution, off below, would start another four.
        *("--workers", "1"),
        *("--backend-store-uri", DATABASE),
        # Clients send files to the server and hold no rights to its folder themselves.
        *("--serve-artifacts", "--artifacts-destination", environment["MLFLOW_ARTIFACTS"]),
        *("--allowed-hosts", environment["MLFLOW_SERVER_ALLOWED_HOSTS"]),
        *("--cors-allowed-origins", environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"]),
    ]


def main() -> None:
    """Check, make the users, and serve until ended.

    Raises:
        ConfigError: If anything is missing or unsafe; nothing was started then.
    """
    if found := complaints(os.environ):
        raise ConfigError("the MLflow server does not start:\n  " + "\n  ".join(found))
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(SETTINGS)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    # Taken out, since the server itself does not need to know them.
    give_passwords(
        {
            "admin": os.environ.pop("MLFLOW_AUTH_ADMIN_PASSWORD"),
            "jobs": os.environ.pop("MLFLOW_JOBS_PASSWORD"),
        }
    )
    # In this process, which has MLflow imported by now.
    from mlflow.cli import cli

    cli(arguments(os.environ), prog_name="mlflow")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
