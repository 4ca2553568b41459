#!/usr/bin/env python3
"""The check itself: every rule is broken once, in a tree made for it, and must be reported."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

CHECK = pathlib.Path(__file__).resolve().parent / "check.py"
COMPILER = sys.argv.pop() if len(sys.argv) > 1 and not sys.argv[-1].startswith("-") else "c++"


class Tree(unittest.TestCase):
    def setUp(self):
        self.root = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.root)
        self.write("model/clean.h", '#pragma once\n#include "kernels/backend.h"\n#include <vector>\n')

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run_check(self, *args):
        done = subprocess.run([sys.executable, CHECK, self.root, *args], capture_output=True,
                              text=True, check=False)
        return done.returncode, done.stdout

    def expect(self, breach):
        code, output = self.run_check()
        self.assertEqual(code, 1, output)
        self.assertIn(breach, output)
        self.assertIn(" 1 breaches", output)

    def test_clean_tree_passes(self):
        self.write("kernels/backend.h", "#pragma once\nclass Backend {\n"
                                        "  virtual void Go() = 0;\n};\n")
        self.write("kernels/cuda/a.cu", "#include <cuda_runtime.h>\n#if CUDA_VERSION > 1\n#endif\n")
        self.write("server/main.cc", '#include "scheduler/job.h"\n#include <grpcpp/grpcpp.h>\n'
                                     '// never call exit(1)\nauto x = std::getenv("HOME");\n')
        code, output = self.run_check()
        self.assertEqual((code, output), (0, "4 files, 0 breaches\n"))

    def test_empty_tree_fails(self):
        shutil.rmtree(self.root / "model")
        self.assertEqual(self.run_check()[0], 1)

    def test_reaching_upwards(self):
        self.write("kernels/core/a.cc", '#include "model/config.h"\n')
        self.expect("kernels/core/a.cc:1: kernels may not include model/config.h")

    def test_cpu_and_cuda_never_meet(self):
        self.write("kernels/cuda/a.cu", '\n#include "kernels/cpu/a.h"\n')
        self.expect("kernels/cuda/a.cu:2: kernels may not include kernels/cpu/a.h")

    def test_scheduler_sees_only_the_pipeline(self):
        self.write("scheduler/a.cc", '#include "model/pipeline.h"\n#include "model/weights.h"\n')
        self.expect("scheduler/a.cc:2: scheduler may not include model/weights.h")

    def test_models_see_only_public_kernels(self):
        self.write("model/a.cc", '#include "kernels/device_factories.h"\n')
        self.expect("model may not include kernels/device_factories.h")

    def test_no_room_includes_tests(self):
        self.write("server/a.cc", '#include "tests/reference/a.h"\n')
        self.expect("server may not include tests/reference/a.h")

    def test_cuda_headers(self):
        self.write("kernels/cpu/a.cc", "#include <cuda_bf16.h>\n")
        self.expect("CUDA (cuda_bf16.h)")

    def test_grpc_headers(self):
        self.write("scheduler/a.cc", "#include <grpcpp/grpcpp.h>\n")
        self.expect("gRPC and protobuf (grpcpp/grpcpp.h)")

    def test_ffmpeg_headers(self):
        self.write("server/a.cc", "#include <libavcodec/avcodec.h>\n")
        self.expect("FFmpeg (libavcodec/avcodec.h)")

    def test_feature_conditionals(self):
        self.write("model/a.cc", "#ifdef SLALOM_CUDA\n#endif\n")
        self.expect("model/a.cc:1: no feature #ifdefs")

    def test_fourth_interface(self):
        self.write("model/a.h", "#pragma once\nclass Sampler {\n  virtual void Go() const = 0;\n};\n")
        self.expect("model/a.h:3: Sampler is a fourth virtual interface")

    def test_exit(self):
        self.write("server/a.cc", "void f() {\n  std::exit(1);\n}\n")
        self.expect("server/a.cc:2: nothing calls exit or abort")

    def test_a_method_called_exit_is_fine(self):
        self.write("server/a.cc", "int a = app.exit(error) + app->exit(error);\n")
        self.assertEqual(self.run_check()[0], 0)

    def test_getenv_below_the_server(self):
        self.write("kernels/cpu/a.cc", 'auto x = getenv("OMP_NUM_THREADS");\n')
        self.expect("kernels/cpu/a.cc:1: no getenv")

    def test_long_file(self):
        self.write("model/a.cc", "int x;\n" * 801)
        self.expect("model/a.cc:801: 801 lines")

    def test_long_core_file(self):
        self.write("kernels/core/a.cc", "\n" * 401)
        self.expect("kernels/core/a.cc:401: 401 lines")

    def test_unfinished_work(self):
        self.write("model/a.cc", "// TO" + "DO: later\n")
        self.expect("model/a.cc:1: unfinished work")

    def test_missing_pragma(self):
        self.write("model/a.h", "// #pragma once\nint F();\n")
        self.expect("model/a.h:1: no #pragma once")

    def test_comments_are_not_code(self):
        self.write("model/a.cc", '/* #include "server/a.h"\n abort(); */\nint a;  // exit(1) libav*/\n')
        self.assertEqual(self.run_check()[0], 0)

    def test_header_that_does_not_compile_alone(self):
        self.write("kernels/backend.h", "#pragma once\nint Go();\n")
        self.write("model/bad.h", "#pragma once\nstd::string Name();\n")
        self.write("model/gpu.h", '#pragma once\n#include "kernels/cuda/absent.h"\n')  # left to nvcc
        self.write("model/a.cc", "")
        commands = self.root / "compile_commands.json"
        commands.write_text(json.dumps([{
            "directory": str(self.root), "file": str(self.root.resolve() / "model/a.cc"),
            "command": f"ccache {COMPILER} -I{self.root} -std=c++20 -o a.o -c model/a.cc"}]))
        code, output = self.run_check("--headers", str(commands))
        self.assertEqual(code, 1, output)
        self.assertIn("model/bad.h:1: does not compile alone", output)
        self.assertIn("2 files, 1 breaches", output)


if __name__ == "__main__":
    unittest.main()
