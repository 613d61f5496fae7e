"""What a run would take, before it is paid for: :func:`plan`."""

from pipelines.plan.job import Plan as Plan
from pipelines.plan.job import plan as plan
from pipelines.plan.question import Question as Question
