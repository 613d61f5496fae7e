"""Launch a job on a cluster that is made for it, or that stands; follow it; end the machines.

    flow.py          launch, attach, stop, down: what a person asks for, in order
    request.py       what is to run, and where
    backend.py       what a place to run must be able to do
      aws.py         Ray's cluster launcher on EC2: account.py and stack.py (what there is),
                     clusterfile.py, fleet.py, quotas.py, prices.py, mlflow_login.py
      kube.py        KubeRay, through kubectl
      standing.py    a cluster that somebody else keeps
    recall.py        a job whose submission was broken off
    jobs.py          submit, follow, stop, over Ray's jobs API
    tunnel.py        a way to it that mends itself
    folder.py        the working directory that is sent along
    record.py        what this machine knows of its launches
    fit.py           does the recipe fit machines that are still to come
    check.py         what is looked at before money is spent
    cost.py          what it will cost an hour

Two rules decide what an interruption does. Until the job is handed over, Ctrl-C takes back what was
started. From then on the job is the cluster's: Ctrl-C, a closed laptop or a lost network end only
the following of it.
"""
