"""The published OAMIP protocol on MNIST and Fashion-MNIST, whole.

    python -m tools.experiments.oamip_tables --mnist DIR --fashion DIR --out DIR --work DIR [--quick]

Trains FC-3, FC-4 and LeNet-5, prunes them by the package's methods at the counts of the published program, and writes
one JSON file, one Markdown page and its plots. Trained networks and finished parts stay in the work folder, so that a
stopped run continues; give another folder to start afresh. Set OMP_NUM_THREADS=1 for the seconds of the page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import auxiliary, data, main_table, page, studies
from .case import Case, open_case
from .cells import Record, Records
from .data import Dataset
from .protocol import DATA, FINE_TUNE, QUICK, Protocol


@dataclass(frozen=True)
class Store:
    """Finished parts of a run, one file each, with the seconds they took."""

    folder: Path
    protocol: Protocol

    def get(self, name: str, make: Callable[[], Record]) -> Record:
        """The part called ``name``, made where it is not there yet."""
        mark = hashlib.sha256(
            json.dumps(asdict(self.protocol), sort_keys=True).encode()
        ).hexdigest()[:8]
        path = self.folder / f"{name}-{mark}.json"
        if not path.exists():
            began = time.perf_counter()
            record = make()
            record["seconds"] = time.perf_counter() - began
            part = path.with_suffix(".part")
            part.write_text(json.dumps(record))
            part.replace(path)
            print(f"{name}: {record['seconds']:.1f} s", flush=True)
        found: Record = json.loads(path.read_text())
        return found


class Run:
    """All parts of one run, in order."""

    def __init__(self, protocol: Protocol, sets: dict[str, Dataset], work: Path) -> None:
        self.protocol = protocol
        self.sets = sets
        self.work = work
        self.store = Store(work, protocol)
        self.cases: dict[tuple[str, str, int], Case] = {}

    def keys(self, first: bool = False, apart: bool = False) -> Iterator[tuple[str, str, int]]:
        """(network, data set, seed); ``first`` seed only, ``apart``: the networks of the dearer studies."""
        for seed in self.protocol.seeds[:1] if first else self.protocol.seeds:
            for name in self.protocol.data:
                for network in self.protocol.networks_apart if apart else self.protocol.networks:
                    yield network, name, seed

    def case(self, key: tuple[str, str, int]) -> Case:
        """A trained network, opened once."""
        if key not in self.cases:
            network, name, seed = key
            self.cases[key] = open_case(self.path(key), network, self.sets[name], seed)
        return self.cases[key]

    def path(self, key: tuple[str, str, int]) -> Path:
        """Path of a trained network."""
        network, name, seed = key
        return self.work / f"{network}-{name}-seed{seed}-epochs{self.protocol.epochs}.onnx"

    def _part(self, study: Callable[..., Record], key: tuple[str, str, int], *more: Any) -> Record:
        """One study of one trained network, which is opened only now."""
        return study(self.case(key), self.protocol, *more)

    def train(self) -> Records:
        """All networks that are not there yet, with the seconds that took."""
        found = {}
        for key in self.keys():
            network, name, seed = key

            def make(network: str = network, name: str = name, seed: int = seed) -> Record:
                path = self.path((network, name, seed))
                if not path.exists():
                    from . import networks  # torch: only where something is trained

                    networks.make(network, self.sets[name], seed, self.protocol.epochs, path)
                return {}

            found[_name(key)] = self.store.get(f"train-{_name(key)}", make)
        return found

    def everything(self) -> dict[str, Records]:
        """Records by study and key."""
        store = self.store
        found: dict[str, Records] = {"train": self.train()}
        found |= {s: {} for s in ("main", "modes", "images", "weights", "number")}
        modes: dict[tuple[str, str], tuple[str, ...]] = {}
        for key in self.keys():
            tried = modes.get(key[:2], main_table.MODES)
            record = store.get(
                f"main-{_name(key)}", partial(self._part, main_table.run, key, tried)
            )
            which = record["exact"]["which"]
            # Later seeds take what served the first.
            modes.setdefault(key[:2], (which,) if which else ())
            found["main"][_name(key)] = record
        for key in self.keys():
            scores = np.array(found["main"][_name(key)]["scores"])
            part = partial(self._part, studies.modes, key, scores)
            found["modes"][_name(key)] = store.get(f"modes-{_name(key)}", part)
        for study, of, apart in (
            ("images", studies.images, True),
            ("weights", studies.weights, False),
            ("number", studies.per_class, False),
        ):
            for key in self.keys(first=True, apart=apart):
                found[study][_name(key)] = store.get(
                    f"{study}-{_name(key)}", partial(self._part, of, key)
                )
        found["transfer"] = self.transfer(found["main"])
        found["tuned"] = self.fine_tune(found["main"])
        found["auxiliary"] = self.auxiliary()
        return found

    def auxiliary(self) -> Records:
        """The VGG whose convolutions are trained and scored with heads of their own."""
        data, epochs = self.sets[auxiliary.DATA], self.protocol.epochs
        found = {}
        for seed in self.protocol.seeds:
            files = auxiliary.Files.of(self.work, seed, epochs)

            def make(seed: int = seed, files: auxiliary.Files = files) -> Record:
                if not files.whole.exists():
                    auxiliary.train(files, data, seed, epochs)
                return auxiliary.run(files, data, seed, self.protocol)

            name = _name(("vgg", auxiliary.DATA, seed))
            found[name] = self.store.get(f"auxiliary-{name}", make)
        return found

    def fine_tune(self, main: Records) -> Records:
        """Masks of every trained network, trained further."""
        found = {}
        for key in self.keys():

            def make(key: tuple[str, str, int] = key) -> Record:
                from . import transfer  # torch

                network, name, seed = key
                masks = main_table.to_tune(self.case(key), main[_name(key)])
                return dict(
                    transfer.fine_tune(
                        network, self.sets[name], seed, masks, self.path(key), FINE_TUNE
                    )
                )

            found[_name(key)] = self.store.get(f"tuned-{_name(key)}", make)
        return found

    def transfer(self, main: Records) -> Records:
        """Masks of one data set on the other."""
        found = {}
        for network, source, seed in self.keys(apart=True):
            for target in self.protocol.data:
                if target == source:
                    continue
                origin, end = (
                    main[_name((network, source, seed))],
                    main[_name((network, target, seed))],
                )

                def make(
                    network: str = network,
                    target: str = target,
                    seed: int = seed,
                    keep: Any = origin["keep"],
                ) -> Record:
                    from . import transfer  # torch

                    return dict(
                        transfer.run(network, self.sets[target], seed, keep, self.protocol.epochs)
                    )

                name = f"{network}-{source}-{target}-seed{seed}"
                record = self.store.get(f"transfer-{name}", make)
                found[name] = {**record, "full": end["reference"], "gone": origin["gone"]}
        return found


def _name(key: tuple[str, str, int]) -> str:
    network, name, seed = key
    return f"{network}-{name}-seed{seed}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 where data is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.experiments.oamip_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in (("mnist", data.MNIST), ("fashion", data.FASHION)):
        about = f"folder of {data.TITLES[name]}'s four IDX files, plain or gzipped ({data.SOURCES[name]}; %(default)s)"
        parser.add_argument(f"--{name}", type=Path, default=default, metavar="DIR", help=about)
    parser.add_argument(
        "--out", type=Path, default=Path("tools/experiments/results"), metavar="DIR"
    )
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="trained networks, finished parts"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, one epoch: only to see that it runs"
    )
    about = f"measure the {page.AUXILIARY_TITLE} again and keep the other records of the folder's results.json"
    parser.add_argument("--only-auxiliary", action="store_true", help=about)
    chosen = parser.parse_args(arguments)
    protocol = QUICK if chosen.quick else Protocol()
    try:
        sets = {name: data.load(name, getattr(chosen, name)) for name in DATA}
        kept = page.read(chosen.out, protocol) if chosen.only_auxiliary else None
    except data.Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen.work.mkdir(parents=True, exist_ok=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    run = Run(protocol, sets, chosen.work)
    if kept is None:
        page.write(chosen.out, protocol, run.everything())
    else:
        page.write(chosen.out, protocol, {**kept, "auxiliary": run.auxiliary()}, renewed=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
