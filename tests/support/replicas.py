"""Tiny replicas of the layouts of official archives: a pixel's level says which image it is."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

Members = dict[str, bytes]


def image(level: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), level % 256, dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def zipped(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, members: Mapping[str, bytes], mode: str = "w:gz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def unpacked(folder: Path, members: Mapping[str, bytes]) -> Path:
    for name, content in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def domainnet() -> Members:
    """Six domains of two classes, three training images and one test image each."""
    members: Members = {}
    for number, domain in enumerate(("clipart", "infograph", "painting", "quickdraw", "real", "sketch")):
        lists: dict[str, list[str]] = {"train": [], "test": []}
        for label, name in enumerate(("aircraft_carrier", "bird")):
            for k in range(4):
                path = f"{domain}/{name}/{domain}_{label:03d}_{k:06d}.jpg"
                members[path] = image(40 * number + 10 * label + k)
                lists["test" if k == 3 else "train"].append(f"{path} {label}")
        for split, lines in lists.items():
            members[f"{domain}_{split}.txt"] = ("\n".join(lines) + "\n").encode()
    return members


def officehome() -> Members:
    root = "OfficeHomeDataset_10072016"
    members = {f"{root}/ImageInfo.csv": b"no image"}
    for number, domain in enumerate(("Art", "Clipart", "Product", "Real World")):
        for label, name in enumerate(("Alarm_Clock", "Backpack")):
            for k in range(5):
                members[f"{root}/{domain}/{name}/{k + 1:05d}.jpg"] = image(50 * number + 10 * label + k)
    return members


def camelyon17() -> Members:
    """Five hospitals of four patches, one held back; at hospital 2 none is marked so, of ten patches."""
    lines = [["", "patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"]]
    members: Members = {}
    for center in range(5):
        for k in range(10 if center == 2 else 4):
            patient, tumor, split = center * 20 + 4, k % 2, int(k == 3 and center != 2)
            place = [str(96 * k), "32", str(tumor), "0", str(center), str(split)]
            lines.append([str(len(lines) - 1), f"{patient:03d}", "4", *place])
            where = f"patient_{patient:03d}_node_4"
            members[f"camelyon17_v1.0/patches/{where}/patch_{where}_x_{96 * k}_y_32.png"] = image(20 * center + k)
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    members["camelyon17_v1.0/metadata.csv"] = text.getvalue().encode()
    return members


def digits_five() -> Members:
    """Five training and two test images a set, in the forms that the collection has."""
    rng = np.random.default_rng(0)
    labels, tested = np.array([3, 1, 0, 9, 2]), np.array([5, 0])
    hot, hot_tested = np.eye(10)[labels], np.eye(10)[tested]

    def grey(count: int) -> np.ndarray:
        return rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)

    def colour(count: int, side: int) -> np.ndarray:
        return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)

    cells = np.empty((2, 2), dtype=object)
    cells[0] = [grey(5).transpose(0, 3, 1, 2) / 255.0, labels[:, None].astype(np.uint8)]
    cells[1] = [grey(2).transpose(0, 3, 1, 2) / 255.0, tested[:, None].astype(np.uint8)]
    files: dict[str, dict[str, np.ndarray]] = {
        "mnist_data.mat": {"train_28": grey(5), "test_28": grey(2), "label_train": hot, "label_test": hot_tested},
        "mnistm_with_label.mat": {
            "train": colour(5, 28),
            "test": colour(2, 28),
            "label_train": hot,
            "label_test": hot_tested,
        },
        "usps_28x28.mat": {"dataset": cells},
    }
    for stem in ("svhn", "synth"):
        for split, own in (("train", labels), ("test", tested)):
            digits = np.where(own == 0, 10, own) if stem == "svhn" else own
            files[f"{stem}_{split}_32x32.mat"] = {"X": np.moveaxis(colour(len(own), 32), 0, -1), "y": digits[:, None]}
    members: Members = {}
    for name, variables in files.items():
        buffer = io.BytesIO()
        savemat(buffer, variables)
        members[f"Digit-Five/{name}"] = buffer.getvalue()
    return members


def tiny_imagenet() -> Members:
    root = "tiny-imagenet-200"
    ids = ("n02124075", "n01443537", "n03000134")
    words = "n01443537\tgoldfish, Carassius auratus\nn02124075\tcat\nn03000134\tcat, another one\nn09999999\tnothing"
    members: Members = {
        f"{root}/wnids.txt": "\n".join(ids).encode(),
        f"{root}/words.txt": words.encode(),
        f"{root}/test/images/test_0.JPEG": image(200, "JPEG"),
    }
    lines = []
    for label, wnid in enumerate(ids):
        for k in range(3):
            members[f"{root}/train/{wnid}/images/{wnid}_{k}.JPEG"] = image(10 * label + k, "JPEG")
        members[f"{root}/train/{wnid}/{wnid}_boxes.txt"] = b"0 0 1 1"
        members[f"{root}/val/images/val_{label}.JPEG"] = image(100 + label, "JPEG")
        lines.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t1\t1")
    members[f"{root}/val/val_annotations.txt"] = "\n".join(lines).encode()
    return members


def mini_imagenet() -> Members:
    members: Members = {}
    for number, name in enumerate(("train", "val", "test")):
        lines = ["filename,label"]
        for label in (f"n0{number}2", f"n0{number}1"):
            for k in range(6):
                file = f"{label}{k:08d}.jpg"
                lines.append(f"{file},{label}")
                members[f"images/{file}"] = image(40 * number + k, "JPEG")
        members[f"{name}.csv"] = "\n".join(lines).encode()
    return members


def core50() -> Members:
    """Sessions 1, 2 and 3 of fifty objects, an image each."""
    return {
        f"core50_128x128/s{s}/o{o}/C_{s:02d}_{o:02d}_000.png": image(50 * (s - 1) + o)
        for s in (1, 2, 3)
        for o in range(1, 51)
    }


def core50_array() -> Members:
    """The same images as one array."""
    members = {name.removeprefix("core50_128x128/"): content for name, content in core50().items()}
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in members.values()])
    buffer = io.BytesIO()
    np.savez(buffer, x=pixels)
    return {"core50_imgs.npz": buffer.getvalue(), "paths.pkl": pickle.dumps(list(members))}


def clear10() -> dict[str, Members]:
    """Two archives; three buckets of two classes, two training images and one test image each."""
    archives: dict[str, Members] = {}
    for split, count in (("train", 2), ("test", 1)):
        members: Members = {f"{split}/class_names.txt": b"BACKGROUND\nbaseball\n"}
        buckets: dict[str, dict[str, str]] = {}
        for bucket in ("1", "2", "10"):
            for label, name in enumerate(("BACKGROUND", "baseball")):
                images = {}
                for k in range(count):
                    path = f"labeled_images/{bucket}/{name}/{k}.jpg"
                    members[f"{split}/{path}"] = image(20 * int(bucket) + 5 * label + k, "JPEG")
                    images[str(k)] = {"IMG_PATH": path, "DATE_TAKEN": "unknown"}
                listing = f"labeled_metadata/{bucket}/{name}.json"
                members[f"{split}/{listing}"] = json.dumps(images).encode()
                buckets.setdefault(bucket, {})[name] = listing
        members[f"{split}/labeled_metadata.json"] = json.dumps(buckets).encode()
        archives[f"clear10-{split}.zip"] = members
    return archives
