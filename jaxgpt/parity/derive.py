from dataclasses import dataclass


@dataclass(frozen=True)
class TorchTensor:
    name: str
    shape: tuple
    module: str
    is_parameter: bool
    tied_to: str | None = None
