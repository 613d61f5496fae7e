"""Log this machine in to the team's MLflow.

A filled cluster.yaml runs `python -m pipelines.launch.mlflow_login SECRET REGION` on the head when
that is set up. The head's role may read the secret; MLflow's client takes user and password from
~/.mlflow/credentials. So no password is in a job's environment or record, which Ray shows to
whoever may see the dashboard.
"""

import configparser
import io
import json
import sys
from pathlib import Path

import boto3

from pipelines.launch.record import write_private

FILE = Path("~/.mlflow/credentials")
NAMES = {
    "mlflow_tracking_username": "MLFLOW_TRACKING_USERNAME",
    "mlflow_tracking_password": "MLFLOW_TRACKING_PASSWORD",
}
"""In MLflow's file, and in the secret."""


def log_in(secret: str, region: str) -> Path:
    """Write user and password of a secret to where MLflow looks.

    Args:
        secret: ARN of a secret in Secrets Manager: JSON with the two names above.
        region: Where it is.

    Returns:
        The file.
    """
    client = boto3.client("secretsmanager", region_name=region)
    loaded = json.loads(client.get_secret_value(SecretId=secret)["SecretString"])
    content = configparser.ConfigParser()
    # MLflow reads it with interpolation, to which a bare % is a mistake.
    content["mlflow"] = {theirs: loaded[ours].replace("%", "%%") for theirs, ours in NAMES.items()}
    text = io.StringIO()
    content.write(text)
    file = FILE.expanduser()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(file, text.getvalue())
    return file


if __name__ == "__main__":
    log_in(*sys.argv[1:])
