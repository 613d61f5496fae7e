"""What a run would take, before it is paid for: :func:`pipelines.plan.job.plan`.

The command line reads :class:`pipelines.plan.question.Question` for its flags, so nothing is
imported here: the rest brings torch along.
"""
