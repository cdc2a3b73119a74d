// How threads may share the copy of a decode batch's six inputs: a thread for each element, a warp for each row (4 or
// 16 bytes a thread), a tile of 16 bytes a thread, each with several block sizes. Stand-alone:
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -o replay_copy_threads replay_copy_threads.cu && ./replay_copy_threads
//
// Prints microseconds of one call as one of 100 nodes of a graph, the best of 9, always on the same buffers.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kMostRequests = 256, kMostColumns = 40960;  // of the static page table
constexpr int kNodes = 100;
constexpr int kVectors = 5, kPrefixSum = 2, kTable = 5;  // fields; the prefix sum has one element more

struct Inputs {
  const int* src[6];
  int* dst[6];
  long src_stride, dst_stride;  // of the table, in elements
  int bs, width;
};

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(status));
  std::exit(1);
}

__host__ __device__ int length(const Inputs& in, int field) { return in.bs + (field == kPrefixSum ? 1 : 0); }

__global__ void thread_per_element(const __grid_constant__ Inputs in) {
  const long table = static_cast<long>(in.bs) * in.width, total = table + kVectors * static_cast<long>(in.bs) + 1;
  for (long i = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<long>(gridDim.x) * blockDim.x) {
    if (i < table) {
      const long row = i / in.width, column = i - row * in.width;
      in.dst[kTable][row * in.dst_stride + column] = in.src[kTable][row * in.src_stride + column];
    } else {
      long k = i - table;
      int field = 0;
      while (k >= length(in, field)) k -= length(in, field++);
      in.dst[field][k] = in.src[field][k];
    }
  }
}

template <typename Unit>
__global__ void warp_per_row(const __grid_constant__ Inputs in) {
  constexpr int kUnit = sizeof(Unit) / sizeof(int);
  const int warps = static_cast<int>(gridDim.x * blockDim.x / 32), lane = static_cast<int>(threadIdx.x & 31);
  for (int row = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32); row < in.bs + kVectors; row += warps) {
    const bool table = row < in.bs;
    const int field = table ? kTable : row - in.bs, count = table ? in.width : length(in, field);
    const int* const src = in.src[field] + (table ? row * in.src_stride : 0);
    int* const dst = in.dst[field] + (table ? row * in.dst_stride : 0);
    for (int c = lane; c < count / kUnit; c += 32) {
      reinterpret_cast<Unit*>(dst)[c] = reinterpret_cast<const Unit*>(src)[c];
    }
    for (int c = count / kUnit * kUnit + lane; c < count; c += 32) dst[c] = src[c];
  }
}

__global__ void tile(const __grid_constant__ Inputs in) {  // the table's tiles, then a block for each vector
  const int columns = static_cast<int>(blockDim.x) * 4, row_tiles = (in.width + columns - 1) / columns;
  const int tiles = row_tiles * in.bs;
  for (int t = static_cast<int>(blockIdx.x); t < tiles + kVectors; t += static_cast<int>(gridDim.x)) {
    if (t >= tiles) {
      const int field = t - tiles;
      for (int k = static_cast<int>(threadIdx.x); k < length(in, field); k += static_cast<int>(blockDim.x)) {
        in.dst[field][k] = in.src[field][k];
      }
      continue;
    }
    const int row = t / row_tiles, column = (t - row * row_tiles) * columns + static_cast<int>(threadIdx.x) * 4;
    const int* const src = in.src[kTable] + row * in.src_stride + column;
    int* const dst = in.dst[kTable] + row * in.dst_stride + column;
    if (column + 4 <= in.width) {
      *reinterpret_cast<int4*>(dst) = *reinterpret_cast<const int4*>(src);
    } else {
      for (int k = 0; k < in.width - column; ++k) dst[k] = src[k];
    }
  }
}

struct Method {
  const char* name;
  void (*kernel)(Inputs);
  long (*blocks)(const Inputs&, int block);  // wanted
};

long element_blocks(const Inputs& in, int block) {
  return (static_cast<long>(in.bs) * in.width + kVectors * static_cast<long>(in.bs) + block) / block;
}
long row_blocks(const Inputs& in, int block) { return ((in.bs + kVectors) * 32L + block - 1) / block; }
long tile_blocks(const Inputs& in, int block) {
  return static_cast<long>(in.bs) * ((in.width + block * 4 - 1) / (block * 4)) + kVectors;
}

constexpr Method kMethods[] = {{"element", thread_per_element, element_blocks},
                               {"warp a row", warp_per_row<int>, row_blocks},
                               {"warp, 16 B", warp_per_row<int4>, row_blocks},
                               {"tile, 16 B", tile, tile_blocks}};

float time_of_node(const Method& method, int block, int bs, int width, int multiprocessors, cudaStream_t stream) {
  Inputs in{};
  in.bs = bs, in.width = width, in.src_stride = width, in.dst_stride = kMostColumns;
  std::vector<void*> owned(12);
  for (int f = 0; f < 6; ++f) {
    check(cudaMalloc(&owned[f], sizeof(int) * (f == kTable ? static_cast<long>(bs) * width : bs + 1)));
    check(cudaMalloc(&owned[6 + f], sizeof(int) * (f == kTable ? static_cast<long>(kMostRequests) * kMostColumns
                                                               : kMostRequests + 1)));
    in.src[f] = static_cast<int*>(owned[f]), in.dst[f] = static_cast<int*>(owned[6 + f]);
  }
  const long resident = multiprocessors * (2048L / block);
  const auto blocks = static_cast<unsigned>(std::max(1L, std::min(method.blocks(in, block), resident)));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kNodes; ++i) method.kernel<<<blocks, block, 0, stream>>>(in);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float best = 1e9f;
  for (int i = 0; i < 10; ++i) {
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(executable, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i > 0) best = std::min(best, milliseconds * 1000 / kNodes);
  }
  for (void* memory : owned) check(cudaFree(memory));
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  return best;
}

}  // namespace

int main() {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  constexpr int kRequests[] = {1, 8, 64, 256}, kWidths[] = {1024, 8192};
  std::printf("%-12s%6s", "method", "block");
  for (const int width : kWidths) {
    for (const int bs : kRequests) std::printf("  %4dx%-5d", bs, width);
  }
  std::printf("\n");
  for (const Method& method : kMethods) {
    for (const int block : {64, 128, 256, 512, 1024}) {
      std::printf("%-12s%6d", method.name, block);
      for (const int width : kWidths) {
        for (const int bs : kRequests) {
          std::printf("  %10.2f", time_of_node(method, block, bs, width, multiprocessors, stream));
        }
      }
      std::printf("\n");
      std::fflush(stdout);
    }
  }
}
