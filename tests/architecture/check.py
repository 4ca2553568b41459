#!/usr/bin/env python3
"""Checks the plan of the house: who includes whom, and the habits that a compiler does not enforce.

    check.py ROOT                                  the rules below, by reading the sources
    check.py ROOT --headers compile_commands.json  every header compiles alone (slow)

Prints one line per breach, `file:line: what`, and exits with 1 when there is any.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOMS = ("proto", "kernels", "model", "scheduler", "server", "tests")
SUFFIXES = (".h", ".cc", ".cu", ".cuh", ".py", ".proto")
SKIPPED = ("build", "goldens", "__pycache__", ".git")

PUBLIC_KERNELS = ("kernels/core/", "kernels/attention.h", "kernels/backend.h")

# Whoever lives under the first path may include only what starts with one of the others. The
# longest match counts; a room that is not here may not include any other.
MAY_INCLUDE = {
    "kernels/core/": ("kernels/core/",),
    "kernels/": ("kernels/core/", "kernels/attention.h", "kernels/backend.h",
                 "kernels/device_factories.h", "kernels/foreign_stream.h"),
    "kernels/cpu/": (*PUBLIC_KERNELS, "kernels/device_factories.h", "kernels/cpu/"),
    "kernels/cuda/": (*PUBLIC_KERNELS, "kernels/device_factories.h", "kernels/foreign_stream.h",
                      "kernels/cuda/"),
    "kernels/c_api/": (*PUBLIC_KERNELS, "kernels/foreign_stream.h", "kernels/c_api/"),
    "model/": (*PUBLIC_KERNELS, "model/"),
    "scheduler/": (*PUBLIC_KERNELS, "model/pipeline.h", "scheduler/"),
    "server/": (*PUBLIC_KERNELS, "model/", "scheduler/", "server/", "slalom/v1/"),
    "tests/": ("kernels/", "model/", "scheduler/", "server/", "slalom/v1/", "tests/"),
}
HOUSE = ("kernels/", "model/", "scheduler/", "server/", "slalom/v1/", "proto/", "tests/")

# Outside libraries and the only places that may know them.
OUTSIDE = (
    ("CUDA", re.compile(r"^(cuda|cublas|cudnn|cufft|curand|nccl|nvtx|nvml|nvrtc|cooperative_groups|"
                        r"cub/|thrust/|cute/|cutlass/|crt/|mma\.h|sm_\d+)"),
     ("kernels/cuda/", "tests/unit/kernels/cuda/", "tests/bench/")),
    ("gRPC and protobuf", re.compile(r"^(grpc|grpcpp|google/protobuf)"),
     ("server/", "tests/unit/server/", "tests/e2e/", "tests/bench/", "tests/fuzz/")),
    ("FFmpeg", re.compile(r"^lib(av|sw)\w+/"),
     ("server/media/", "tests/unit/server/", "tests/e2e/", "tests/bench/", "tests/fuzz/")),
    ("oneDNN", re.compile(r"^(dnnl|oneapi/dnnl)"), ("kernels/cpu/",)),
)

# The three virtual interfaces and where they live.
INTERFACES = {"kernels/backend.h": {"Backend"}, "model/pipeline.h": {"Pipeline", "Generation"},
              "scheduler/job_sink.h": {"JobSink"}, "scheduler/job.h": {"JobSink"}}

LINE_LIMIT = 800
CORE_LINE_LIMIT = 400

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]')
CONDITIONAL = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif)\b.*(CUDA|SLALOM_)")
PURE = re.compile(r"\)\s*(const)?\s*(noexcept)?\s*=\s*0\s*;")
CLASS = re.compile(r"^(?:class|struct)\s+(\w+)\s*(?:final\s*)?(?::[^;]*)?\{")
LEAVES = re.compile(r"(?<![.>\w])(?:std::|::)?(exit|_exit|quick_exit|abort|terminate)\s*\(")
GETENV = re.compile(r"(?<![.>\w])(?:std::|::)?(?:secure_)?getenv\s*\(")
TO_DO = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b")


def sources(root):
    for room in ROOMS:
        for folder, folders, files in os.walk(root / room):
            folders[:] = sorted(f for f in folders if f not in SKIPPED)
            for file in sorted(files):
                if file.endswith(SUFFIXES):
                    path = pathlib.Path(folder, file)
                    yield path.relative_to(root).as_posix(), path


def rule_for(name):
    matches = [prefix for prefix in MAY_INCLUDE if name.startswith(prefix)]
    return MAY_INCLUDE[max(matches, key=len)] if matches else ()


COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


def without_comments(text):
    """The code alone, line by line. Strings stay: #include needs them."""
    keep = lambda m: m[0] if m[0][0] == '"' else "\n" * m[0].count("\n")
    return COMMENT.sub(keep, text).split("\n")


def check_include(name, target, quoted):
    if target.startswith(HOUSE):
        if not target.startswith(rule_for(name)):
            yield f"{name.split('/')[0]} may not include {target}"
    elif quoted and name.endswith((".h", ".cuh")) and "/" not in target:
        yield f'"{target}": includes are written from the root'
    for library, pattern, places in OUTSIDE:
        if pattern.match(target) and not name.startswith(places):
            yield f"{library} ({target}) may be known only in {', '.join(places)}"


def check_code(name, code):
    klass = None
    for number, line in enumerate(code, 1):
        if match := INCLUDE.match(line):
            for breach in check_include(name, match[2], match[1] == '"'):
                yield number, breach
        if CONDITIONAL.match(line) and not name.startswith("kernels/cuda/"):
            yield number, "no feature #ifdefs: the build swaps files instead"
        if match := CLASS.match(line):
            klass = match[1]
        if name.startswith("tests/"):
            continue
        if PURE.search(line) and klass not in INTERFACES.get(name, ()):
            yield number, f"{klass} is a fourth virtual interface"
        if LEAVES.search(line):
            yield number, "nothing calls exit or abort: throw slalom::Error"
        if GETENV.search(line) and not name.startswith("server/"):
            yield number, "no getenv below server/"


def check_file(name, path):
    lines = path.read_text(encoding="utf-8").split("\n")
    length = len(lines) - (lines[-1] == "")
    limit = CORE_LINE_LIMIT if name.startswith("kernels/core/") else LINE_LIMIT
    if length > limit:
        yield length, f"{length} lines; past {limit}, split along a seam"
    for number, line in enumerate(lines, 1):
        if TO_DO.search(line):
            yield number, "unfinished work belongs into an issue"
    if not name.endswith((".py", ".proto")):
        code = without_comments("\n".join(lines))
        if name.endswith((".h", ".cuh")) and "#pragma once" not in (line.strip() for line in code):
            yield 1, "no #pragma once"
        yield from check_code(name, code)


def check_sources(root):
    count, breaches = 0, []
    for name, path in sources(root):
        count += 1
        breaches += [f"{name}:{number}: {what}" for number, what in check_file(name, path)]
    if count == 0:
        breaches.append(f"{root}: no sources here")
    return count, breaches


def reading_flags(words):
    """Of a command's words those that find and read headers, each with its value."""
    flags, words = [], iter(words)
    for word in words:
        if word in ("-isystem", "-I", "-D"):
            flags.append((word, next(words)))
        elif word.startswith(("-I", "-D", "-std", "-f", "-m", "-W", "-isystem")):
            flags.append((word,))
    return flags


def room_flags(commands):
    """Per folder with a compiled C++ source: compiler and the flags that find and read headers, of
    all its sources together."""
    flags = {}
    for entry in commands:
        if not entry["file"].endswith(".cc"):
            continue
        words = shlex.split(entry["command"]) if "command" in entry else list(entry["arguments"])
        words = [w for w in words if not w.endswith("ccache")]
        folder = os.path.dirname(entry["file"])
        compiler, found, _ = flags.setdefault(folder, (words[0], {}, entry["directory"]))
        found.update(dict.fromkeys(reading_flags(words[1:])))
    return {folder: ([compiler, *(word for flag in found for word in flag)], directory)
            for folder, (compiler, found, directory) in flags.items()}


def compile_alone(header, flags, directory):
    command = flags + ["-Wno-pragma-once-outside-header", "-fsyntax-only", "-x", "c++", str(header)]
    if "clang" not in flags[0]:
        command.remove("-Wno-pragma-once-outside-header")
        command += ["-w"]  # GCC calls the pragma in a main file a warning; errors still count
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def needs_cuda(name, path):
    return name.startswith("kernels/cuda/") or '#include "kernels/cuda/' in path.read_text()


def check_headers(root, compile_commands):
    flags = room_flags(json.loads(compile_commands.read_text()))
    work = []
    for name, path in sources(root):
        if not name.endswith(".h") or needs_cuda(name, path):
            continue  # nvcc's business: its build compiles them, and elsewhere CUDA is not there
        # The flags of the nearest folder that has a source; a build without that room skips it.
        for folder in path.parents:
            if str(folder) in flags:
                work.append((name, path, *flags[str(folder)]))
                break
            if folder == root:
                break
    breaches = [] if work else [f"{compile_commands}: no header could be matched to a room"]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, *_), done in zip(work, pool.map(lambda w: compile_alone(*w[1:]), work)):
            if done.returncode != 0:
                first = next((m for m in done.stderr.splitlines() if "error" in m), done.stderr)
                breaches.append(f"{name}:1: does not compile alone: {first}")
    return len(work), breaches


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=pathlib.Path)
    parser.add_argument("--headers", type=pathlib.Path, metavar="compile_commands.json")
    args = parser.parse_args()
    root = args.root.resolve()
    count, breaches = check_headers(root, args.headers) if args.headers else check_sources(root)
    print("\n".join(breaches + [f"{count} files, {len(breaches)} breaches"]))
    return bool(breaches)


if __name__ == "__main__":
    sys.exit(main())
