"""A stand-in for the `aws` of a machine: the one command that cluster.yaml gives it."""

import base64
import json
import os
import sys
from pathlib import Path

import boto3

if __name__ == "__main__":
    if sys.argv[1:4] != ["ecr", "get-login-password", "--region"]:
        sys.exit(f"aws: not known here: {sys.argv[1:]}")
    env = json.loads((Path(os.environ["MACHINE"]) / "image.json").read_text())["env"]
    ecr = boto3.client("ecr", sys.argv[4], endpoint_url=env["AWS_ENDPOINT_URL"])
    (data,) = ecr.get_authorization_token()["authorizationData"]
    print(base64.b64decode(data["authorizationToken"]).decode().split(":", 1)[1])
