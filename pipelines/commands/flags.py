"""What several commands are told, as flags."""

from typing import Annotated

import tyro

from droppos.measure.finetune_recipe import Finetune
from pipelines.evidence.study import Study
from pipelines.finetune_run import FinetuneRun
from pipelines.launch.on import On
from pipelines.plan.question import Question
from pipelines.recipe import MeasureProtocol, Recipe
from pipelines.spread import Spread
from pipelines.tracking import Where

STORAGE, EXPERIMENT = Where().storage, Where().experiment

RecipeFlags = Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
MeasureFlags = Annotated[MeasureProtocol, tyro.conf.FlagConversionOff]
FinetuneFlags = Annotated[Finetune, tyro.conf.arg(name="")]
FinetuneRunFlags = Annotated[FinetuneRun, tyro.conf.arg(name="")]
QuestionFlags = Annotated[Question, tyro.conf.arg(name="")]
SpreadFlags = Annotated[Spread, tyro.conf.arg(name="")]
StudyFlags = Annotated[Study, tyro.conf.arg(name="")]
WhereFlags = Annotated[Where, tyro.conf.arg(name="")]
OnFlags = Annotated[On, tyro.conf.arg(name="")]
RecipeName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")]
_BACKBONE = (
    "Folder of an export to timm, of a checkpoint, or of a run (its newest); models:/NAME@ALIAS; "
    "a file of weights of the DropPos reference, MAE or timm; or timm:NAME, which timm downloads"
)
BackboneName = Annotated[
    tyro.conf.Positional[str], tyro.conf.arg(metavar="BACKBONE", help=f"{_BACKBONE}.")
]
ExportedName = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
        metavar="BACKBONE", help=f"{_BACKBONE}. Of a run of droppos finetune: its classifier."
    ),
]
