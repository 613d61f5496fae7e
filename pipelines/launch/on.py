"""Where a launch is, as a person says it; the command line imports no more for its help."""

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, slots=True)
class On:
    """Where machines are, and what they are made by."""

    on: str | None = None
    """aws (Ray's cluster launcher), kube (KubeRay), or the address of a cluster that stands, such
    as http://10.0.0.5:8265. A launch is on aws if not said; attach, stop and down find it in this
    machine's record of the launch."""
    cluster: str | None = None
    """aws: file for Ray's cluster launcher; ./cluster.yaml when not given. kube: manifest with a
    RayCluster, or a folder for kustomize; ./infra/kuberay/base."""
    stack: str | None = None
    """aws: CloudFormation stack of the account, whose outputs fill the file; droppos when not
    given."""
    mlflow_stack: str | None = None
    """aws: stack of the team's MLflow server, if there is one."""
    region: str | None = None
    """aws: where the stack is; the standard one (AWS_REGION, profile) when not given."""
    context: str | None = None
    """kube: context of kubectl; the current one when not given."""
    namespace: str | None = None
    """kube: the manifest's when not given; if it has none either, the context's."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """aws: show what `ray up` and `ray down` say; a file keeps it in any case."""
