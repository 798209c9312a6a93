"""The words that the API takes: of jobs, models, tokens and webhooks."""

from typing import Literal

JobKind = Literal["pretrain", "probe", "finetune", "evaluate", "embed"]
ModelLibrary = Literal["timm", "hf", "hf-mae"]
TokenRole = Literal["reader", "submitter", "admin"]
WebhookEvents = Literal["ended", "status", "all"]
DeliveryStatus = Literal["pending", "delivered", "dead"]
