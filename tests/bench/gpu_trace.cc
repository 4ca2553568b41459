// Where the GPU's time goes, of any program: a library that the CUDA driver loads.
//
//   CUDA_INJECTION64_PATH=libgpu_trace.so GPU_TRACE_OUT=table.txt GPU_TRACE_RUNS=6 pipeline_bench
//   ...
//
// At exit it writes a table of kernels and copies, by name, and of the gaps between them. What came
// before the last large copy to the device does not count: that was loading. GPU_TRACE_RUNS
// divides all sums: the runs since then, the one that warms up among them. Tracing costs gaps some
// microseconds each.
#include <cupti.h>
#include <cxxabi.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t kBufferBytes = std::size_t{8} << 20;
constexpr std::uint64_t kLargeCopy = std::uint64_t{1} << 20;
constexpr std::size_t kMostRows = 40;
constexpr std::size_t kMostGaps = 12;

struct Record {
  std::uint64_t begin = 0, end = 0;  // ns
  std::string name;
  bool loads = false;  // a large copy to the device
};

struct Sum {
  double milliseconds = 0;
  int count = 0;
};
using Sums = std::map<std::string, Sum>;

// One process has one trace; CUPTI calls back from a thread of its own.
struct Trace {
  std::mutex mutex;
  std::vector<Record> records;
};
Trace& TheTrace() {
  static Trace trace;
  return trace;
}

// Without arguments and our own namespaces; templates stay.
std::string ShortName(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> demangled(
      abi::__cxa_demangle(mangled, nullptr, nullptr, &status), &std::free);
  std::string name = demangled ? demangled.get() : mangled;
  for (const char* part : {"slalom::", "cuda::", "(anonymous namespace)::", "void "}) {
    const std::string text = part;
    for (std::size_t at; (at = name.find(text)) != std::string::npos;) name.erase(at, text.size());
  }
  int depth = 0;
  for (std::size_t i = 1; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) name.resize(i);
  }
  return name.substr(0, 100);
}

void CUPTIAPI GiveBuffer(std::uint8_t** buffer, std::size_t* size, std::size_t* most) {
  *size = kBufferBytes;
  *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *most = 0;
}

void CUPTIAPI TakeBuffer(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t,
                         std::size_t valid) {
  Trace& trace = TheTrace();
  const std::lock_guard lock(trace.mutex);
  CUpti_Activity* activity = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &activity) == CUPTI_SUCCESS) {
    if (activity->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto* kernel = reinterpret_cast<CUpti_ActivityKernel9*>(activity);
      trace.records.push_back({kernel->start, kernel->end, ShortName(kernel->name)});
    } else if (activity->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto* copy = reinterpret_cast<CUpti_ActivityMemcpy5*>(activity);
      const bool up = copy->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_HTOD;
      const bool down = copy->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOH;
      trace.records.push_back({copy->start, copy->end,
                               up     ? "[copy to the device]"
                               : down ? "[copy to the host]"
                                      : "[copy]",
                               up && copy->bytes >= kLargeCopy});
    } else if (activity->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      const auto* set = reinterpret_cast<CUpti_ActivityMemset4*>(activity);
      trace.records.push_back({set->start, set->end, "[set]"});
    }
  }
  std::free(buffer);
}

void Print(std::FILE* file, const Sums& sums, std::size_t most, double runs) {
  std::vector<std::pair<std::string, Sum>> rows(sums.begin(), sums.end());
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) {
    return a.second.milliseconds > b.second.milliseconds;
  });
  for (std::size_t i = 0; i < std::min(rows.size(), most); ++i) {
    const Sum& sum = rows[i].second;
    std::fprintf(file, "%10.3f ms %8.1f x %9.4f ms  %s\n", sum.milliseconds / runs,
                 sum.count / runs, sum.milliseconds / sum.count, rows[i].first.c_str());
  }
}

void Write(std::FILE* file, std::vector<Record> records, double runs) {
  std::sort(records.begin(), records.end(),
            [](const Record& a, const Record& b) { return a.begin < b.begin; });
  const auto loaded =
      std::find_if(records.rbegin(), records.rend(), [](const Record& r) { return r.loads; });
  records.erase(records.begin(), loaded.base());
  if (records.empty()) {
    std::fprintf(file, "nothing ran after the last large copy to the device\n");
    return;
  }
  Sums names, gaps;
  double busy = 0;
  std::uint64_t end = records.front().begin;
  const Record* last = nullptr;
  for (const Record& record : records) {
    Sum& sum = names[record.name];
    sum.milliseconds += static_cast<double>(record.end - record.begin) * 1e-6;
    ++sum.count;
    if (last != nullptr && record.begin > end) {
      Sum& gap = gaps[last->name.substr(0, 48) + " -> " + record.name.substr(0, 48)];
      gap.milliseconds += static_cast<double>(record.begin - end) * 1e-6;
      ++gap.count;
    }
    if (record.end > end) {
      busy += static_cast<double>(record.end - std::max(end, record.begin)) * 1e-6;
      end = record.end;
      last = &record;
    }
  }
  const double span = static_cast<double>(end - records.front().begin) * 1e-6;
  std::fprintf(file, "%.0f runs; each %.3f ms, of which busy %.3f\n", runs, span / runs,
               busy / runs);
  Print(file, names, kMostRows, runs);
  std::fprintf(file, "gaps, by what stands around them:\n");
  Print(file, gaps, kMostGaps, runs);
}

void Finish() {
  cuptiActivityFlushAll(1);
  Trace& trace = TheTrace();
  const std::lock_guard lock(trace.mutex);
  const char* path = std::getenv("GPU_TRACE_OUT");
  const char* runs = std::getenv("GPU_TRACE_RUNS");
  std::FILE* file = path != nullptr ? std::fopen(path, "w") : stderr;
  if (file == nullptr) return;
  Write(file, std::move(trace.records), std::max(1.0, runs != nullptr ? std::atof(runs) : 1.0));
  if (file != stderr) std::fclose(file);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  TheTrace();  // lives longer than what was registered after it
  cuptiActivityRegisterCallbacks(GiveBuffer, TakeBuffer);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
  std::atexit(Finish);
  return 1;
}
