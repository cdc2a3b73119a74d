// nsa_metadata_generate through a plan: every check and all addresses once, then a run without arguments.
#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "attention/plan_runs.h"
#include "overlap.h"
#include "sgl_kernel_ops.h"
#include "stack.h"

namespace sgl_kernel {
namespace {

constexpr const char* kOp = "nsa_metadata_generate";
constexpr uint64_t kMagic = 0x67656e657261u * 256 + kAbiVersion;
constexpr int64_t kMostBlocks = 1 << 17;  // that write tables, or one for each request
constexpr int64_t kBlocksInGraph = 32;
constexpr int64_t kMaxColumns = kMaxLength;  // column arithmetic is 32-bit; offsets are 64-bit

// The fields of a destination, in the order in which their tensors stand in `dsts`. Bit f of dst_fields[d]
// says that destination d has field f; it has at least one.
enum DestinationField {
  kCacheSeqlens,
  kCuSeqlensK,
  kPageTable1,
  kNsaCacheSeqlens,
  kNsaCuSeqlensK,
  kSeqlensExpanded,
  kRealPageTable,
  kNumDestinationFields,
};
struct FieldInfo {
  const char* suffix;  // of FieldName
  int64_t dim;
  bool per_row;  // one element (or table row) per row, else per request
  bool prefix;   // one element more
};
constexpr FieldInfo kFields[kNumDestinationFields] = {
    {"destinations[%d].cache_seqlens", 1, false, false},  {"destinations[%d].cu_seqlens_k", 1, false, true},
    {"destinations[%d].page_table_1", 2, true, false},    {"destinations[%d].nsa_cache_seqlens", 1, true, false},
    {"destinations[%d].nsa_cu_seqlens_k", 1, true, true}, {"destinations[%d].seqlens_expanded", 1, true, false},
    {"destinations[%d].real_page_table", 2, true, false},
};

struct PlanArgs {
  int64_t mode, bs;
  TensorView seq_lens, req_pool_indices, req_to_token, accept_lens;
  int64_t page_size, topk, rows_per_req;
  bool has_accept_lens, packed, whole_pages;
  int64_t rows() const { return bs * rows_per_req; }
};

void check_scalars(const PlanArgs& args) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check_range(kOp, {"mode"}, args.mode, 0, 2);
  check_range(kOp, {"bs"}, args.bs, 0, kMaxRows);
  check_range(kOp, {"page_size"}, args.page_size, 1, kMost);
  check_range(kOp, {"topk"}, args.topk, 1, kMost);
  check_range(kOp, {"rows_per_req"}, args.rows_per_req, 1,
              args.mode == 0 ? 1 : kMaxRows / std::max<int64_t>(args.bs, 1));
  if (args.packed && args.mode != 2) reject(kOp, {"packed"}, "False outside DRAFT_EXTEND (mode 2)", "True");
  if (args.has_accept_lens != (args.mode == 2)) {
    reject(kOp, {"accept_lens"}, args.mode == 2 ? "a tensor in DRAFT_EXTEND" : "None outside DRAFT_EXTEND",
           args.has_accept_lens ? "a tensor" : "None");
  }
}

void check_index_vector(TensorView& view, int32_t device_index, int64_t size) {
  check_device(kOp, view, device_index);
  if (view.dtype != aoti_torch_dtype_int32() && view.dtype != aoti_torch_dtype_int64()) {
    reject(kOp, view.name, "int32 or int64", dtype_name(view.dtype));
  }
  check_tensor(kOp, view, {device_index, view.dtype, 1, 1, size});
}

void check_inputs(PlanArgs& args) {
  const int32_t device_index = args.seq_lens.device_index;
  check_index_vector(args.seq_lens, device_index, args.bs);
  check_index_vector(args.req_pool_indices, device_index, args.bs);
  check_tensor(kOp, args.req_to_token, {device_index, aoti_torch_dtype_int32(), 2, args.bs > 0 ? 1 : 0, 0});
  if (args.req_to_token.cols > kMaxColumns) {
    reject(kOp, args.req_to_token.name, "at most " + std::to_string(kMaxColumns) + " columns", args.req_to_token.cols);
  }
  if (args.has_accept_lens) {
    check_tensor(kOp, args.accept_lens, {device_index, aoti_torch_dtype_int32(), 1, 1, args.bs});
  }
}

struct Destination {
  TensorView fields[kNumDestinationFields];
  bool has[kNumDestinationFields] = {};
  int32_t seqlens_offset = 0;
  bool has_vectors() const {
    for (int f = 0; f < kNumDestinationFields; ++f) {
      if (has[f] && kFields[f].dim == 1) return true;
    }
    return false;
  }
  int32_t* data(int f) const { return has[f] ? reinterpret_cast<int32_t*>(fields[f].data) : nullptr; }
};

// Columns that a table may hold: page_table_1 one per token, real_page_table one per page.
void check_table_width(const TensorView& table, const PlanArgs& args, int64_t page_size) {
  const int64_t most = (args.req_to_token.cols + page_size - 1) / page_size;
  if (table.cols <= most) return;
  reject(kOp, table.name,
         "at most " + std::to_string(most) + " columns (req_to_token has " + std::to_string(args.req_to_token.cols) +
             ", page size " + std::to_string(page_size) + ")",
         table.cols);
}

void check_destination(Destination& dst, const PlanArgs& args) {
  if (std::none_of(std::begin(dst.has), std::end(dst.has), [](bool has) { return has; })) {
    reject(kOp, {"", "destinations[%d]", dst.fields[0].name.a}, "at least one tensor", "none");
  }
  for (int f = 0; f < kNumDestinationFields; ++f) {
    if (!dst.has[f]) continue;
    const int64_t count = kFields[f].per_row ? args.rows() : args.bs;
    const bool table = kFields[f].dim == 2;
    check_tensor(kOp, dst.fields[f],
                 {args.seq_lens.device_index, aoti_torch_dtype_int32(), kFields[f].dim, table ? count : 1,
                  table ? 0 : count + kFields[f].prefix, /*written=*/true});
    if (table) check_table_width(dst.fields[f], args, f == kPageTable1 ? 1 : args.page_size);
  }
}

// What destinations share has to get the same values: a table whatever the offset, a vector with equal offsets.
void check_overlaps(const PlanArgs& args, const std::vector<Destination>& dsts) {
  std::vector<Access> accesses;
  for (const TensorView* input : {&args.seq_lens, &args.req_pool_indices, &args.req_to_token, &args.accept_lens}) {
    if (input == &args.accept_lens && !args.has_accept_lens) continue;
    const int64_t size = input->element_size;
    accesses.push_back({{input->data, input->rows, input->cols * size, input->row_stride * size}, input, false, 0});
  }
  for (const Destination& dst : dsts) {
    for (int f = 0; f < kNumDestinationFields; ++f) {
      if (!dst.has[f]) continue;
      const TensorView& view = dst.fields[f];
      const int64_t count = kFields[f].per_row ? args.rows() : args.bs;
      const bool table = kFields[f].dim == 2;
      const int64_t cols = table ? view.cols : count + kFields[f].prefix;
      accesses.push_back({{view.data, table ? count : 1, cols * 4, view.row_stride * 4},
                          &view,
                          true,
                          f + kNumDestinationFields * (table ? 0 : int64_t{dst.seqlens_offset})});
    }
  }
  check_apart(kOp, accesses.data(), accesses.data() + accesses.size(), "input");
}

GenerateVectors vectors_of(const Destination& dst) {
  return {dst.data(kCacheSeqlens),  dst.data(kCuSeqlensK),      dst.data(kNsaCacheSeqlens),
          dst.data(kNsaCuSeqlensK), dst.data(kSeqlensExpanded), dst.seqlens_offset};
}

GenerateTables tables_of(const Destination& dst) {
  const bool slots = dst.has[kPageTable1], pages = dst.has[kRealPageTable];
  const TensorView &table1 = dst.fields[kPageTable1], &table2 = dst.fields[kRealPageTable];
  return {dst.data(kPageTable1),
          dst.data(kRealPageTable),
          slots ? table1.row_stride : 0,
          pages ? table2.row_stride : 0,
          dst.seqlens_offset,
          slots ? static_cast<int32_t>(table1.cols) : 0,
          pages ? static_cast<int32_t>(table2.cols) : 0};
}

bool same_tables(const GenerateTables& a, const GenerateTables& b) {
  return a.page_table_1 == b.page_table_1 && a.stride1 == b.stride1 && a.width1 == b.width1 &&
         a.real_page_table == b.real_page_table && a.stride2 == b.stride2 && a.width2 == b.width2;
}

// Destinations that share their tables need them written once, up to the longest of their lengths.
void add_tables(GenerateParams& launch, const GenerateTables& tables) {
  if (tables.width1 == 0 && tables.width2 == 0) return;
  for (int t = 0; t < launch.num_tables; ++t) {
    if (!same_tables(launch.tables[t], tables)) continue;
    launch.tables[t].seqlens_offset = std::max(launch.tables[t].seqlens_offset, tables.seqlens_offset);
    return;
  }
  launch.tables[launch.num_tables++] = tables;
}

bool rows_start_on_16_bytes(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 4 == 0;
}

// Whether one slot of each page is read: where the caller says that a page's slots follow each other, or nobody wants
// any but the first; and four columns that move at once are of one page.
bool reads_by_page(const GenerateParams& launch) {
  const auto wants_slots = [](const GenerateTables& tables) { return tables.page_table_1 != nullptr; };
  const bool power_of_two = (launch.page_size & (launch.page_size - 1)) == 0;
  return power_of_two && launch.page_size >= kColumnsPerLoad &&
         (launch.whole_pages || std::none_of(launch.tables, launch.tables + launch.num_tables, wants_slots));
}

// Sets what depends on all tables of the launch.
void set_tables(GenerateParams& launch) {
  if (launch.num_tables == 0) return;
  const bool by_page = reads_by_page(launch);
  launch.max_offset = launch.min_offset = launch.tables[0].seqlens_offset;
  bool aligned = by_page || rows_start_on_16_bytes(launch.req_to_token, launch.token_stride);
  int64_t max_cols = 0, common_cols = kMaxColumns;
  for (int t = 0; t < launch.num_tables; ++t) {
    const GenerateTables& tables = launch.tables[t];
    launch.max_offset = std::max(launch.max_offset, tables.seqlens_offset);
    launch.min_offset = std::min(launch.min_offset, tables.seqlens_offset);
    launch.has_pages = launch.has_pages || tables.width2 > 0;
    const int64_t last_page_column = tables.width2 > 0 ? (tables.width2 - int64_t{1}) * launch.page_size + 1 : 0;
    max_cols = std::max({max_cols, int64_t{tables.width1}, last_page_column});
    if (tables.page_table_1 == nullptr) continue;
    aligned = aligned && rows_start_on_16_bytes(tables.page_table_1, tables.stride1);
    common_cols = std::min(common_cols, int64_t{tables.width1});
  }
  launch.max_cols = static_cast<int32_t>(max_cols);
  launch.common_cols = aligned ? static_cast<int32_t>(common_cols) : 0;
  launch.whole_pages = by_page && launch.common_cols > 0;
  launch.pages_by_warp =
      launch.has_pages && launch.page_size % kColumnsPerLoad == 0 && launch.page_size >= kWarpColumns / 32;
}

GenerateParams common_params(const PlanArgs& args) {
  GenerateParams p{};
  p.seq_lens = args.seq_lens.data;
  p.req_pool_indices = args.req_pool_indices.data;
  p.req_to_token = reinterpret_cast<const int32_t*>(args.req_to_token.data);
  p.accept_lens = reinterpret_cast<const int32_t*>(args.accept_lens.data);
  p.token_stride = args.req_to_token.row_stride;
  p.pool_size = args.req_to_token.rows;
  p.topk = static_cast<int32_t>(args.topk);
  p.page_size = static_cast<int32_t>(args.page_size);
  p.by_page_size = divisor(args.page_size);
  p.bs = static_cast<int32_t>(args.bs);
  p.rows_per_req = static_cast<int32_t>(args.rows_per_req);
  p.mode = static_cast<Mode>(args.mode);
  p.seq_lens_64 = args.seq_lens.element_size == 8;
  p.req_pool_indices_64 = args.req_pool_indices.element_size == 8;
  p.packed = args.packed;
  p.whole_pages = args.whole_pages;
  return p;
}

std::vector<GenerateParams> make_launches(const PlanArgs& args, const std::vector<Destination>& dsts) {
  std::vector<GenerateParams> launches;
  for (size_t d = 0; d < dsts.size(); ++d) {
    if (d % kMaxGenerateDestinations == 0) launches.push_back(common_params(args));
    GenerateParams& launch = launches.back();
    if (dsts[d].has_vectors()) launch.vectors[launch.num_vectors++] = vectors_of(dsts[d]);
    add_tables(launch, tables_of(dsts[d]));
  }
  for (GenerateParams& launch : launches) set_tables(launch);
  return launches;
}

// Checks and packs what the stack holds.
Planned<GenerateParams> make_generate_plan(StableIValue* stack) {
  PlanArgs args{};
  args.mode = take<int64_t>(stack[0]);
  args.bs = take<int64_t>(stack[1]);
  TensorHandle seq_lens = take_tensor(stack[2]), req_pool_indices = take_tensor(stack[3]);
  TensorHandle req_to_token = take_tensor(stack[4]);
  auto tensors = take<std::vector<torch::stable::Tensor>>(stack[5]);
  const auto dst_fields = take<std::vector<int64_t>>(stack[6]);
  const auto seqlens_offsets = take<std::vector<int64_t>>(stack[7]);
  args.page_size = take<int64_t>(stack[8]);
  args.topk = take<int64_t>(stack[9]);
  args.rows_per_req = take<int64_t>(stack[10]);
  TensorHandle accept_lens = take_optional_tensor(stack[11]);
  args.packed = take<bool>(stack[12]);
  args.whole_pages = take<bool>(stack[13]);

  args.has_accept_lens = accept_lens != nullptr;
  check_scalars(args);
  args.seq_lens = view_tensor(seq_lens.get(), {"seq_lens"});
  args.req_pool_indices = view_tensor(req_pool_indices.get(), {"req_pool_indices"});
  args.req_to_token = view_tensor(req_to_token.get(), {"req_to_token"});
  if (accept_lens) args.accept_lens = view_tensor(accept_lens.get(), {"accept_lens"});
  check_inputs(args);

  if (seqlens_offsets.size() != dst_fields.size()) {
    reject(kOp, {"seqlens_offsets"}, std::to_string(dst_fields.size()) + " values", seqlens_offsets.size());
  }
  std::vector<Destination> dsts(dst_fields.size());
  size_t next = 0;
  for (int d = 0; d < static_cast<int>(dsts.size()); ++d) {
    for (int f = 0; f < kNumDestinationFields; ++f) {
      const FieldName name{"", kFields[f].suffix, d};
      dsts[d].fields[f].name = name;
      if ((dst_fields[d] >> f & 1) == 0) continue;
      if (next == tensors.size()) reject(kOp, {"dsts"}, "one tensor per set bit of dst_fields", tensors.size());
      dsts[d].fields[f] = view_tensor(tensors[next++].get(), name);
      dsts[d].has[f] = true;
    }
    check_range(kOp, {"", "destinations[%d].seqlens_offset", d}, seqlens_offsets[d], -kMaxOffset, kMaxOffset);
    dsts[d].seqlens_offset = static_cast<int32_t>(seqlens_offsets[d]);
    check_destination(dsts[d], args);
  }

  check_overlaps(args, dsts);

  std::vector<GenerateParams> launches = make_launches(args, dsts);
  const int32_t device_index = args.seq_lens.device_index;
  backend::prepare(device_index);
  for (TensorHandle* input : {&seq_lens, &req_pool_indices, &req_to_token, &accept_lens}) {
    if (*input) tensors.emplace_back(input->release());
  }
  return {{kMagic, static_cast<int64_t>(launches.size()), device_index, backend::device_type(), {0, 0}},
          std::move(launches),
          std::move(tensors)};
}

// A block for each tile of requests that are as long as `max_len`: the memory then sees the tiles in order, and no SM
// waits for another at the end. Where lengths are not known, the tables' width has to be covered, and a block beyond a
// request's length costs half a nanosecond: then blocks are at most kBlocksInGraph for each SM.
TableGrid table_grid(const GenerateParams& launch, int32_t device_index, int64_t max_len) {
  const bool has_tables = launch.num_tables > 0 && launch.bs > 0 && launch.max_cols > 0, bounded = max_len >= 0;
  TableGrid grid{};
  grid.threads = has_tables && bounded && launch.bs <= 2 * kFewThreads ? kFewThreads : kManyThreads;
  if (!has_tables) return grid;
  const int64_t columns = bounded ? std::clamp<int64_t>(max_len, 1, launch.max_cols) : launch.max_cols;
  const int64_t tile = tile_columns(grid.threads), tiles = (columns + tile - 1) / tile;  // of a request
  const int64_t most = bounded ? kMostBlocks : backend::multiprocessors(device_index) * kBlocksInGraph;
  const int64_t of_block = std::min((tiles * launch.bs + most - 1) / most, tiles);
  grid.pieces = static_cast<int32_t>((tiles + of_block - 1) / of_block);
  grid.blocks = grid.pieces * launch.bs;
  grid.by_pieces = divisor(grid.pieces);
  return grid;
}

GenerateRun checked_run(const PlanView<GenerateParams>& plan, int64_t max_len) {
  if (max_len < -1) reject(kOp, {"max_len"}, "-1 (not known) or a length", max_len);
  return {plan, max_len};
}

}  // namespace

GenerateRun open_generate_run(AtenTensorHandle plan, int64_t max_len) {
  return checked_run(open_plan<GenerateParams>(kOp, plan, kMagic), max_len);
}

GenerateRun open_generate_run(const PlanHeader* plan, int64_t max_len) {
  return checked_run(open_plan<GenerateParams>(kOp, plan, kMagic), max_len);
}

void GenerateRun::enqueue(const backend::Stream& stream) const {
  for (const GenerateParams* launch = plan.begin; launch != plan.end; ++launch) {
    backend::launch_generate(*launch, table_grid(*launch, plan.header->device_index, max_len), stream);
  }
}

void nsa_metadata_generate_plan(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = make_generate_plan(stack);
  stack[0] = torch::stable::detail::from(plan.as_tensor());
}

void nsa_metadata_generate_run(StableIValue* stack, uint64_t, uint64_t) {
  const TensorHandle plan_tensor = take_tensor(stack[0]);
  const GenerateRun run = open_generate_run(plan_tensor.get(), take<int64_t>(stack[1]));
  run.enqueue(backend::Stream(run.plan.header->device_index));
}

void nsa_metadata_generate_once(StableIValue* stack, uint64_t, uint64_t) {
  const int64_t max_len = take<int64_t>(stack[14]);
  const auto plan = make_generate_plan(stack);
  checked_run(plan.view(), max_len).enqueue(backend::Stream(plan.header.device_index));
}

}  // namespace sgl_kernel
