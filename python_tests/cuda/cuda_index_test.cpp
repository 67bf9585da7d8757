// The index logic of the CUDA kernels, on the host: that everything is covered once and only once.
// Whole kernels run in the emulator.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/conv/geometry.h"
#include "cuda/conv/implicit_gemm.h"
#include "cuda/conv_grad/tile.h"
#include "cuda/util/grouped.h"
#include "cuda/gemm/heuristics.h"
#include "cuda/gemm/loaders.h"
#include "cuda/gemm/scheduler.h"
#include "cuda/gemm/tile.h"
#include "cuda/reduce/segments.h"
#include "cuda/util/integers.h"
#include "cuda/util/strides.h"
#include "cuda/util/vectors.h"

namespace {

using namespace l2rw::cuda;
using l2rw::Convolution;

#define EXPECT(condition)                                                           \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

using LargeTile = TensorCoreTile<128, 128, 64, 32>;
using WarpgroupTile = TensorCoreTile<128, 192, 16, 192>;
using NarrowWarpgroupTile = TensorCoreTile<128, 128, 16, 128>;
using SmallTile = TensorCoreTile<64, 64, 32, 32>;
using NarrowTile = TensorCoreTile<128, 32, 32, 32>;
using LargeSimtTile = SimtTile<64, 128>;
using NarrowSimtTile = SimtTile<128, 32>;

// Small numbers, the same in every run, whose sums are exact in every type used here.
struct Numbers {
  uint64_t state = 1;
  int64_t below(int64_t bound) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(bound));
  }
  int64_t small() { return below(7) - 3; }
};

// The vectors that eight lanes read at once lie in different banks.
void expect_no_conflict(const std::vector<int>& offsets) {
  EXPECT(offsets.size() == 8);
  std::map<int, int> banks;  // of 16 bytes
  for (const int offset : offsets) {
    const auto [found, is_new] = banks.insert({offset / kVectorBytes % 8, offset});
    EXPECT(is_new || found->second == offset);  // lanes may read the same address
  }
}

template <class Tile>
void test_tile() {
  std::set<std::pair<int, int>> sums;
  std::set<int> copied;
  const MatrixView left{nullptr, 0, Tile::kRows, kDepthBytes};
  const MatrixView right{nullptr, 0, Tile::kColumns, kDepthBytes};
  for (int thread = 0; thread < Tile::kThreads; ++thread) {
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int row = Tile::row(thread, r);
      EXPECT(0 <= row && row < Tile::kRows);
      // The lanes that add up a row are neighbours, and the first of them writes it.
      EXPECT(row == Tile::row(thread / Tile::kLanesN * Tile::kLanesN, r));
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int column = Tile::column(thread, c);
        EXPECT(0 <= column && column < Tile::kColumns);
        EXPECT(sums.insert({row, column}).second);
        EXPECT(
            column ==
            Tile::column(thread, c / Tile::kAdjacent * Tile::kAdjacent) + c % Tile::kAdjacent);
      }
    }
    EXPECT(Tile::warp_n(thread) < Tile::kWarpsN);
    load_operands<Tile>(thread, left, 0, right, 0, 0, [&](int offset, const char*, int bytes) {
      EXPECT(offset % kVectorBytes == 0 && 0 <= offset && offset < Tile::kStageBytes);
      EXPECT(bytes == kVectorBytes);
      EXPECT(copied.insert(offset).second);
    });
  }
  EXPECT(sums.size() == size_t{Tile::kRows} * Tile::kColumns);
  EXPECT(copied.size() == size_t{Tile::kStageBytes} / kVectorBytes);
}

template <class Tile>
void test_ldmatrix_loads() {
  for (int thread = 0; thread < Tile::kThreads; thread += 8) {
    for (int step = 0; step < kDepthVectors; step += 2) {
      for (int b = 0; b < Tile::kFragmentsA; ++b) {
        std::vector<int> offsets;
        for (int lane = thread; lane < thread + 8; ++lane) {
          offsets.push_back(swizzled_offset(Tile::a_row(lane, b), step + Tile::a_vector(lane)));
        }
        expect_no_conflict(offsets);
      }
      for (int b = 0; b < Tile::kFragmentsB; ++b) {
        std::vector<int> offsets;
        for (int lane = thread; lane < thread + 8; ++lane) {
          offsets.push_back(
              swizzled_offset(Tile::kRows + Tile::b_row(lane, b), step + Tile::b_vector(lane)));
        }
        expect_no_conflict(offsets);
      }
    }
  }
}

template <class Tile>
void test_simt_loads() {
  for (int thread = 0; thread < Tile::kThreads; thread += 8) {
    for (int vector = 0; vector < kDepthVectors; ++vector) {
      std::vector<int> rows;
      std::vector<int> columns;
      for (int lane = thread; lane < thread + 8; ++lane) {
        rows.push_back(swizzled_offset(Tile::row(lane, 1), vector));
        columns.push_back(swizzled_offset(Tile::kRows + Tile::column(lane, 1), vector));
      }
      expect_no_conflict(rows);
      expect_no_conflict(columns);
    }
  }
}

// The bits of a matrix descriptor, as the PTX manual numbers them.
void test_descriptors() {
  for (const uint32_t base : {0u, 1024u, 163840u}) {
    for (int row = 0; row < 320; row += kSwizzleRows) {
      for (int vector = 0; vector < kDepthVectors; vector += 2) {
        const uint64_t descriptor = matrix_descriptor(base, row, vector);
        EXPECT((descriptor & 0x3fff) * 16 == base + row * 128 + vector * 16);
        EXPECT((descriptor >> 14 & 3) == 0 && (descriptor >> 30 & 3) == 0);
        EXPECT((descriptor >> 32 & 0x3fff) * 16 == 1024);
        EXPECT(descriptor >> 46 == uint64_t{1} << 16);  // swizzle of 128 bytes, no base offset
      }
    }
  }
  EXPECT(warpgroup_row(127) == 0 && warpgroup_row(128) == 64);
}

void test_matrix_view() {
  const MatrixView operand{nullptr, 48, 3, 40};
  EXPECT(RowSource(operand, 1, 0)(1).bytes == 16);
  EXPECT(RowSource(operand, 1, 32)(1).bytes == 8);
  EXPECT(RowSource(operand, 1, 48)(1).bytes == 0);
  EXPECT(RowSource(operand, 1, 0)(2).bytes == 0);
}

void test_divisors() {
  Numbers numbers;
  constexpr int64_t kEnd = int64_t{1} << 31;
  const auto expect_quotients = [&](int64_t d) {
    const Divisor divisor(d);
    EXPECT(divisor.divisor() == d);
    for (const int64_t n : {int64_t{0}, d - 1, d, d + 1, 2 * d - 1, kEnd / d * d - 1, kEnd - 1}) {
      EXPECT(n >= kEnd || divisor.divide(static_cast<int32_t>(n)) == n / d);
    }
    for (int trial = 0; trial < 50; ++trial) {
      const int64_t n = numbers.below(int64_t{1} << (1 + numbers.below(31)));
      EXPECT(divisor.divide(static_cast<int32_t>(n)) == n / d);
    }
  };
  for (int64_t d = 1; d < 3000; ++d) {
    expect_quotients(d);
  }
  for (int bits = 12; bits <= 31; ++bits) {
    for (const int64_t off : {-1, 0, 1}) {
      if ((int64_t{1} << bits) + off < kEnd) {
        expect_quotients((int64_t{1} << bits) + off);
      }
    }
    expect_quotients(1 + numbers.below((int64_t{1} << bits) - 1));
  }
}

void test_ranges() {
  for (int64_t count = 0; count < 40; ++count) {
    for (int64_t parts = 1; parts < 45; ++parts) {
      int64_t next = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const Range range = split_range(count, parts, part);
        EXPECT(range.begin == next && range.begin <= range.end);
        EXPECT(parts > count || range.begin < range.end);
        next = range.end;
      }
      EXPECT(next == count);
    }
  }
}

void test_tiles_of_blocks() {
  for (int64_t rows = 1; rows < 40; rows += 3) {
    for (int64_t columns = 1; columns < 30; columns += 2) {
      std::set<std::pair<int64_t, int64_t>> tiles;
      for (int64_t block = 0; block < rows * columns; ++block) {
        const TileCoord tile = tile_of_block(block, rows, columns);
        EXPECT(0 <= tile.row && tile.row < rows && 0 <= tile.column && tile.column < columns);
        EXPECT(tiles.insert({tile.row, tile.column}).second);
      }
    }
  }
}

void test_k_tile_iterator() {
  for (int64_t columns = 1; columns < 9; ++columns) {
    for (int64_t k_tiles = 1; k_tiles < 12; ++k_tiles) {
      for (int64_t splits = 1; splits <= k_tiles; ++splits) {
        for (int64_t blocks = 1; blocks <= columns * splits; ++blocks) {
          std::set<std::pair<int64_t, int64_t>> steps;
          for (int64_t block = 0; block < blocks; ++block) {
            KTileIterator step(split_range(columns * splits, blocks, block), splits, k_tiles);
            EXPECT(!step.done());
            for (; !step.done(); step.next()) {
              EXPECT(steps.insert({step.column_tile(), step.k_tile}).second);
            }
          }
          EXPECT(static_cast<int64_t>(steps.size()) == columns * k_tiles);
        }
      }
    }
  }
}

void test_dense_heuristics() {
  Numbers numbers;
  for (int trial = 0; trial < 20000; ++trial) {
    const int64_t rows = 1 + numbers.below(1 << numbers.below(24));
    const int64_t columns = 1 + numbers.below(1 << numbers.below(16));
    const int64_t k_tiles = 1 + numbers.below(1 << numbers.below(9));
    const int64_t processors = 1 + numbers.below(150);
    const int64_t bytes = numbers.below(2) == 0 ? 4 : 8;
    const TileShape large = trial % 2 == 0 ? tile_shape<LargeTile>() : tile_shape<WarpgroupTile>();
    const TileShape small = tile_shape<SmallTile>();
    const TileShape narrow = tile_shape<NarrowTile>();
    const int64_t products = 1 + numbers.below(1 << numbers.below(7));
    const GemmPlan plan =
        plan_dense(products, rows, columns, k_tiles, large, small, narrow, processors, bytes);
    const bool is_narrow = plan.tile == TileKind::narrow;
    const bool is_large = plan.tile == TileKind::large;
    const TileShape tile = is_narrow ? narrow : is_large ? large : small;
    EXPECT(is_narrow == (columns <= narrow.columns));
    EXPECT(!is_large || large_fit(rows, columns, large, small));
    EXPECT(plan.row_tiles == ceil_div(rows, tile.rows));
    EXPECT(plan.column_tiles == ceil_div(columns, tile.columns));
    EXPECT(1 <= plan.column_blocks && plan.column_blocks <= plan.column_tiles * plan.splits);
    EXPECT(
        plan.column_blocks == 1 || plan.column_blocks * products * rows * bytes <= kWorkspaceBytes);
    EXPECT(1 <= plan.splits && plan.splits <= k_tiles);
  }
}

void test_factored_heuristics() {
  Numbers numbers;
  for (int trial = 0; trial < 20000; ++trial) {
    const int64_t processors = 1 + numbers.below(150);
    const int64_t bytes = numbers.below(2) == 0 ? 4 : 8;
    const TileShape ldmatrix =
        trial % 2 == 0 ? tile_shape<LargeTile>() : tile_shape<WarpgroupTile>();
    const TileShape large = bytes == 4 ? ldmatrix : tile_shape<LargeSimtTile>();
    const TileShape small = bytes == 4 ? tile_shape<SmallTile>() : tile_shape<LargeSimtTile>();
    std::vector<FactoredProblem> layers(static_cast<size_t>(1 + numbers.below(kMaxLayers)));
    for (FactoredProblem& layer : layers) {
      layer = {
          1 + numbers.below(1 << numbers.below(24)),
          1 + numbers.below(1 << numbers.below(16)),
          1 + numbers.below(1 << numbers.below(9)),
          1 + numbers.below(1 << numbers.below(9))};
    }
    const std::vector<GemmPlan> plans = plan_factored(layers, large, small, processors, bytes);
    const FactoredWorkspace workspace(layers, plans, small);
    EXPECT(plans.size() == layers.size());
    int64_t most = 0;  // bytes
    int64_t end = 0;
    int64_t large_tiles = 0;
    for (size_t l = 0; l < plans.size(); ++l) {
      const GemmPlan& plan = plans[l];
      const bool is_large = plan.tile == TileKind::large;
      const TileShape tile = is_large ? large : small;
      EXPECT(plan.row_tiles == ceil_div(layers[l].rows, tile.rows));
      EXPECT(plan.column_tiles == ceil_div(layers[l].columns, tile.columns));
      EXPECT(1 <= plan.column_blocks && plan.column_blocks <= plan.column_tiles);
      const int64_t tiles = plan.row_tiles * plan.column_tiles;
      EXPECT(workspace.partial[l] == end);
      if (plan.z_splits > 0) {
        EXPECT(!is_large && plan.column_blocks == 1 && tiles < processors);
        const int64_t g_splits = plan.splits - plan.z_splits;
        EXPECT(plan.z_splits <= layers[l].z_k_tiles);
        EXPECT(1 <= g_splits && g_splits <= layers[l].g_k_tiles);
        EXPECT(plan.blocks() == tiles * plan.splits && plan.tiles_of_block() == 1);
        end += plan.splits * tiles * tile.rows * tile.columns;
        most += plan.splits * tiles * tile.rows * tile.columns * bytes;
      } else {
        EXPECT(plan.splits == 1 && plan.blocks() == plan.row_tiles * plan.column_blocks);
        EXPECT(plan.tiles_of_block() * plan.column_blocks >= plan.column_tiles);
        most += plan.column_blocks > 1 ? plan.column_blocks * layers[l].rows * bytes : 0;
      }
      large_tiles += is_large ? tiles : 0;
    }
    EXPECT(most <= kWorkspaceBytes);
    EXPECT(large_tiles == 0 || large_tiles >= processors);
    EXPECT(workspace.parts == end);
    for (size_t l = 0; l < plans.size(); ++l) {
      EXPECT(workspace.row_sums[l] == end);
      end += plans[l].column_blocks * layers[l].rows;
    }
    EXPECT(workspace.size == end);
  }
}

// All layers together fill the processors: none waits for a block that is much longer than its
// share.
void test_work_of_a_grouped_launch() {
  const TileShape large = tile_shape<LargeTile>();
  const TileShape small = tile_shape<SmallTile>();
  const FactoredProblem layer{256, 64, 16, 16};
  for (const size_t count : {1, 3, 12, 20}) {
    const std::vector<FactoredProblem> layers(count, layer);
    int64_t blocks = 0;
    for (const GemmPlan& plan : plan_factored(layers, large, small, 132, 4)) {
      EXPECT(plan.z_splits > 0);
      blocks += plan.blocks();
    }
    // Two stages are the least that a block is started for.
    EXPECT(blocks == (count == 1 ? 64 : count == 3 ? 192 : count == 12 ? 288 : 320));
  }
  // A slice_k layer is split beside one that fills the processors, a layer like that one is not.
  const std::vector<GemmPlan> plans =
      plan_factored({{16384, 1024, 4, 4}, {64, 64, 64, 64}}, large, small, 132, 4);
  EXPECT(plans[0].tile == TileKind::large && plans[0].z_splits == 0 && plans[1].z_splits > 0);
  // Tiles that would be half empty are small ones.
  const auto tile_for = [&](int64_t columns) {
    return plan_factored({{65536, columns, 16, 16}}, large, small, 132, 4)[0].tile;
  };
  EXPECT(tile_for(64) == TileKind::small && tile_for(128) == TileKind::large);
}

void test_longest_blocks_first() {
  const std::vector<FactoredProblem> layers{
      {64, 64, 1, 1}, {64, 64, 9, 9}, {64, 64, 3, 3}, {64, 64, 9, 9}};
  const std::vector<GemmPlan> plans(4, GemmPlan{TileKind::small, 1, 1, 1, 1});
  EXPECT((longest_blocks_first(layers, plans) == std::vector<size_t>{1, 3, 2, 0}));
}

template <int Capacity>
void test_grouped_layers(int layers) {
  Numbers numbers;
  for (int trial = 0; trial < 50; ++trial) {
    GroupedLayers<int, Capacity> table;
    std::vector<int> expected;
    for (int layer = 0; layer < layers; ++layer) {
      const int64_t count = numbers.below(4) == 0 ? 0 : 1 + numbers.below(200);
      table.add(100 + layer, count);
      expected.insert(expected.end(), static_cast<size_t>(count), layer);
    }
    EXPECT(table.total == static_cast<int64_t>(expected.size()));
    for (int64_t number = 0; number < table.total; ++number) {
      const int layer = table.layer_of(number);
      EXPECT(layer == expected[static_cast<size_t>(number)]);
      EXPECT(table.entries[layer] == 100 + layer);
      EXPECT(number == table.first[layer] || expected[static_cast<size_t>(number - 1)] == layer);
      EXPECT(number >= table.first[layer]);
    }
  }
}

void test_segments() {
  for (const int64_t vectors : {1, 2, 3, 17, 64, 200, 256, 257, 5000}) {
    const BlockShape block = block_shape(vectors);
    EXPECT(block.x * block.y == kBlockThreads);
    EXPECT(block.x >= vectors || block.x == kBlockThreads);
    for (const int64_t outer : {1, 2, 300, 100000}) {
      for (const int64_t examples : {1, 100, 100000}) {
        const Segments segments = segments_of(examples, outer, block, 132);
        int64_t next = 0;
        for (unsigned segment = 0; segment < segments.count; ++segment) {
          const Range range = segments.range(segment, outer);
          EXPECT(range.begin == next && range.begin < range.end);
          next = range.end;
        }
        EXPECT(next == outer);
      }
    }
  }
  alignas(16) const float numbers[8] = {};
  EXPECT(fits_vectors(numbers, {8, 4, 1}, 8, 4));
  EXPECT(!fits_vectors(numbers, {8, 4, 1}, 6, 4));
  EXPECT(!fits_vectors(numbers, {8, 3, 1}, 8, 4));
  EXPECT(!fits_vectors(numbers, {9, 4, 1}, 8, 4));
  EXPECT(!fits_vectors(numbers + 1, {8, 4, 1}, 8, 4));
  EXPECT(!fits_vectors(numbers, {8, 4, 2}, 8, 4));
}

void test_strided_layout() {
  Numbers numbers;
  for (int trial = 0; trial < 2000; ++trial) {
    const int64_t dims = numbers.below(5);
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    for (int64_t d = 0; d < dims; ++d) {
      sizes.push_back(1 + numbers.below(4));
    }
    int64_t run = 1;
    strides.resize(sizes.size());
    const bool whole = numbers.below(2) == 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = whole ? run : numbers.below(20);
      run *= sizes[d];
    }
    const auto layout = StridedLayout::of(sizes, strides);
    EXPECT(layout.has_value());
    EXPECT(!whole || layout->dims == 1);
    std::vector<int64_t> at(sizes.size(), 0);
    for (int64_t k = 0; k < run; ++k) {
      int64_t offset = 0;
      for (size_t d = 0; d < sizes.size(); ++d) {
        offset += at[d] * strides[d];
      }
      EXPECT(layout->offset(k) == offset);
      for (size_t d = sizes.size(); d-- > 0;) {
        if (++at[d] < sizes[d]) {
          break;
        }
        at[d] = 0;
      }
    }
  }
  const std::vector<int64_t> nine(9, 2);
  std::vector<int64_t> apart;
  for (int64_t d = 0; d < 9; ++d) {
    apart.push_back(int64_t{1} << (2 * d));
  }
  EXPECT(!StridedLayout::of(nine, apart).has_value());
}

l2rw::Convolution convolution(
    int64_t examples,
    int64_t groups,
    int64_t inputs,
    int64_t outputs,
    const std::vector<int64_t>& in,
    const std::vector<int64_t>& kernel,
    const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation) {
  l2rw::Convolution conv{examples, groups, inputs, outputs, {}, {}, {}, {}, {}, {}};
  for (int d = 0; d < 3; ++d) {
    conv.in[d] = in[d];
    conv.kernel[d] = kernel[d];
    conv.stride[d] = stride[d];
    conv.padding[d] = padding[d];
    conv.dilation[d] = dilation[d];
    conv.out[d] = (in[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  return conv;
}

// Beyond what 32 bits count, and up to it.
void test_convolution_sizes() {
  const auto conv = [](int64_t examples, int64_t width) {
    return convolution(
        examples, 1, 4, 8, {1, 1, width}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1});
  };
  const auto pixels = [](int64_t width) { return ImageView{nullptr, width * 16, 0, 16, 16}; };
  const int64_t width = int64_t{1} << 20;
  EXPECT(ImplicitGemmOperands::fits(conv(2000, width), pixels(width), 16));
  EXPECT(!ImplicitGemmOperands::fits(conv(2048, width), pixels(width), 16));
  EXPECT(!ImplicitGemmOperands::fits(conv(1, width), pixels(width), int64_t{1} << 33));
  Convolution groups = conv(1, width);
  EXPECT(ImplicitGemmOperands::fits(groups, {nullptr, 0, int64_t{1} << 35, 0, 16}, 16));
  groups.groups = 2;
  EXPECT(!ImplicitGemmOperands::fits(groups, {nullptr, 0, int64_t{1} << 35, 0, 16}, 16));
  // The last pixel, from the start of z.
  const ImplicitGemmOperands rows(conv(2000, width), pixels(width), nullptr, 16);
  const RowPixel last = rows.row_pixel(0, 2000 * width - 1);
  EXPECT(last.z == 2000 * width - 2 && last.at[2] == width - 2);
  EXPECT(rows.z_source(last, rows.tap_vector(1)).bytes == 16);
  EXPECT(rows.z_source(last, rows.tap_vector(1)).from - rows.z.data == (2000 * width - 1) * 16);
  EXPECT(rows.z_source(last, rows.tap_vector(2)).bytes == 0);
  EXPECT(rows.z_source(rows.row_pixel(0, 2000 * width), rows.tap_vector(1)).bytes == 0);
}

// The loads of a warp, of four bytes each, have no bank conflict.
void expect_own_banks(const std::vector<int>& offsets) {
  std::map<int, int> banks;
  for (const int offset : offsets) {
    const auto [found, is_new] = banks.insert({offset / 4 % 32, offset});
    EXPECT(is_new || found->second == offset);
  }
}

// A convolution of three spatial dimensions whose output is what its input gives.
Convolution draw_convolution(Numbers& numbers) {
  Convolution conv{};
  conv.examples = 1 + numbers.below(3);
  conv.groups = 1 + numbers.below(3);
  conv.inputs = numbers.below(20);
  conv.outputs = 1 + numbers.below(70);
  for (int d = 0; d < 3; ++d) {
    do {
      conv.in[d] = numbers.below(9);
      conv.kernel[d] = 1 + numbers.below(4);
      conv.stride[d] = 1 + numbers.below(3);
      conv.padding[d] = numbers.below(3);
      conv.dilation[d] = 1 + numbers.below(2);
      const int64_t free =
          conv.in[d] + 2 * conv.padding[d] - conv.dilation[d] * (conv.kernel[d] - 1) - 1;
      conv.out[d] = free < 0 ? 0 : free / conv.stride[d] + 1;
    } while (conv.out[d] == 0);
  }
  return conv;
}

// The definition: output pixel p reads input pixel p stride + tap dilation - padding.
int64_t pixel_met(const Convolution& conv, int64_t p, int64_t tap) {
  int64_t pixel = 0;
  int64_t size = 1;
  for (int d = 2; d >= 0; --d) {
    const int64_t at = p % conv.out[d] * conv.stride[d] + tap % conv.kernel[d] * conv.dilation[d] -
                       conv.padding[d];
    p /= conv.out[d];
    tap /= conv.kernel[d];
    if (at < 0 || at >= conv.in[d]) {
      return -1;
    }
    pixel += at * size;
    size *= conv.in[d];
  }
  return p > 0 ? -1 : pixel;
}

void test_pixels_of_convolutions() {
  Numbers numbers;
  for (int trial = 0; trial < 3000; ++trial) {
    const Convolution conv = draw_convolution(numbers);
    EXPECT(ConvolutionGeometry::fits(conv));
    const ConvolutionGeometry geometry = ConvolutionGeometry::of(conv);
    const int step = 1 + static_cast<int>(numbers.below(70));
    PixelCoord coord = geometry.coord(0);
    for (int p = 0; p < conv.pixels() + 2 * step; p += step) {
      for (int tap = 0; tap < conv.taps(); ++tap) {
        const int64_t met = pixel_met(conv, p, tap);
        for (const PixelCoord& at : {coord, geometry.coord(p)}) {
          const InputPixel input = geometry.input_pixel(at, geometry.tap(tap));
          EXPECT((input.exists ? int64_t{input.number} : int64_t{-1}) == met);
        }
      }
      coord = geometry.advance(coord, geometry.coord(step));
    }
  }
  const Convolution small = draw_convolution(numbers);
  for (int64_t Convolution::* const none : {&Convolution::examples, &Convolution::groups}) {
    Convolution large = small;
    large.*none = int64_t{1} << 60;
    EXPECT(ConvolutionGeometry::fits(large));
  }
  for (auto sizes : {&Convolution::in, &Convolution::out, &Convolution::kernel}) {
    Convolution large = small;
    (large.*sizes)[0] = (large.*sizes)[1] = int64_t{1} << 20;
    (large.*sizes)[2] = 1;
    EXPECT(!ConvolutionGeometry::fits(large));
    (large.*sizes)[0] = int64_t{1} << 62;
    EXPECT(!ConvolutionGeometry::fits(large));
  }
  Convolution large = small;
  large.padding[1] = int64_t{1} << 40;
  EXPECT(!ConvolutionGeometry::fits(large));
}

template <class Tile>
void test_gradient_tile() {
  // Each element of the tile belongs to one thread of each slice of the depth, a row's sum of g to
  // the lanes of that row.
  std::set<std::tuple<int, int, int>> sums;
  for (int thread = 0; thread < Tile::kThreads; ++thread) {
    EXPECT(0 <= Tile::slice_k(thread) && Tile::slice_k(thread) < Tile::kSlicesK);
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int row = Tile::row(thread, r);
      EXPECT(0 <= row && row < Tile::kRows);
      EXPECT(row == Tile::row(thread / Tile::kLanesN * Tile::kLanesN, r));
      for (int c = 0; c < Tile::kProductColumns; ++c) {
        const int column = Tile::column(thread, c);
        EXPECT(0 <= column && column < Tile::kColumns);
        EXPECT(sums.insert({Tile::slice_k(thread), row, column}).second);
      }
    }
  }
  EXPECT(sums.size() == size_t{Tile::kSlicesK} * Tile::kRows * Tile::kColumns);
  // What every architecture from sm_80 on has for one block.
  EXPECT(kStages * Tile::kStageBytes <= 99 * 1024);
  EXPECT(
      (kStagedBytes<Tile, std::conditional_t<Tile::kElementBytes == 8, double, float>>) <=
      99 * 1024);

  // Lanes that read at once have no bank conflict, and all read within their stage.
  for (int warp = 0; warp < Tile::kThreads; warp += 32) {
    for (int pixel = 0; pixel + (Tile::kSimt ? 0 : 15) < Tile::kDepth; pixel += 8) {
      std::vector<int> offsets;
      const auto read = [&](int first, int count, auto offset, int bytes) {
        offsets.clear();
        for (int lane = first; lane < first + count; ++lane) {
          offsets.push_back(offset(warp + lane));
          EXPECT(0 <= offsets.back() && offsets.back() + bytes <= Tile::kStageBytes);
        }
      };
      if constexpr (Tile::kAccess == Access::ldmatrix) {
        for (int first = 0; first < 32; first += 8) {
          read(first, 8, [&](int t) { return Tile::row_ldmatrix(t, pixel, 0); }, 16);
          expect_no_conflict(offsets);
          read(first, 8, [&](int t) { return Tile::column_ldmatrix(t, pixel, 2); }, 16);
          expect_no_conflict(offsets);
        }
      } else if constexpr (Tile::kAccess == Access::scalars) {
        for (int k = 0; k < 4; ++k) {
          read(0, 32, [&](int t) { return Tile::row_scalar(t, pixel, 0, k); }, 4);
          expect_own_banks(offsets);
        }
        read(0, 32, [&](int t) { return Tile::column_scalar(t, pixel, 1, 1); }, 4);
        expect_own_banks(offsets);
      }
    }
  }
}

// All that a block loads, against the definition; and all that it stores.
template <class Tile>
void test_gradient_coverage() {
  Numbers numbers;
  constexpr int64_t kBytes = Tile::kElementBytes;
  for (int trial = 0; trial < 40; ++trial) {
    const Convolution conv = draw_convolution(numbers);
    const int64_t z_pixel = ceil_div(conv.groups * (conv.inputs + 16) * kBytes, 16) * 16;
    const int64_t g_pixel = ceil_div(conv.groups * (conv.outputs + 16) * kBytes, 16) * 16;
    const int64_t z_group = ceil_div(conv.inputs * kBytes, 16) * 16;
    const int64_t g_group = ceil_div(conv.outputs * kBytes, 16) * 16;
    const int64_t z_size = conv.in[0] * conv.in[1] * conv.in[2] * z_pixel;
    const int64_t g_size = conv.pixels() * g_pixel;
    const char* const z_data = nullptr;
    const ImageView z{z_data, z_size, z_group, z_pixel, conv.inputs * kBytes};
    const ImageView g{z_data, g_size, g_group, g_pixel, conv.outputs * kBytes};
    const GradientProblem problem = make_gradient_problem<Tile>(conv, z, g);
    std::set<int64_t> stored;
    for (int t = 0; t < problem.tile_count(); ++t) {
      const GradientTileCoord tile = tile_coord<Tile>(problem, t);
      const TileColumns& columns = tile.columns;
      EXPECT(columns.vectors * columns.taps <= Tile::kVectors);
      std::set<int> offsets;
      for (int column = 0; column < Tile::kVectors; ++column) {
        for (int k = 0; columns.has(column) && k < Tile::kElements; ++k) {
          EXPECT(offsets.insert(columns.offset(column, k, Tile::kElements)).second);
        }
      }
      EXPECT(offsets.empty() || *offsets.rbegin() + 1 == static_cast<int>(offsets.size()));
      const int64_t example = numbers.below(conv.examples);
      std::vector<GradientLoader<Tile>> loaders;
      // Addresses lie within the image, whether something is read there or not.
      const auto expect_within = [&](int64_t from, int64_t image_size) {
        EXPECT(0 <= from && (from < conv.examples * image_size || image_size == 0));
      };
      for (int thread = 0; thread < Tile::kThreads; ++thread) {
        loaders.emplace_back(problem, tile, thread);
      }
      for (int k_tile = numbers.below(2) == 0 ? 0 : problem.k_tiles / 2; k_tile < problem.k_tiles;
           ++k_tile) {
        std::map<int, std::pair<int64_t, int>> copied;
        for (auto& loader : loaders) {
          loader.load(example, k_tile, [&](int offset, const char* from, int bytes, bool) {
            EXPECT(copied.insert({offset, {from - z_data, bytes}}).second);
          });
        }
        EXPECT(copied.size() == size_t{Tile::kDepth} * (Tile::kRowVectors + Tile::kVectors));
        for (int pixel = 0; pixel < Tile::kDepth; ++pixel) {
          const int64_t p = int64_t{k_tile} * Tile::kDepth + pixel;
          for (int v = 0; v < Tile::kRowVectors; ++v) {
            const auto [from, bytes] = copied.at(Tile::row_offset(pixel, v));
            const int64_t byte = tile.first_output * kBytes + v * 16;
            const int64_t left = std::clamp<int64_t>(conv.outputs * kBytes - byte, 0, 16);
            EXPECT(bytes == (p < conv.pixels() ? left : 0));
            expect_within(from, g_size);
            EXPECT(
                bytes == 0 || from == example * g_size + p * g_pixel + tile.group * g_group + byte);
          }
          for (int v = 0; v < Tile::kVectors; ++v) {
            const auto [from, bytes] = copied.at(Tile::column_offset(pixel, v));
            const int64_t met = columns.has(v) ? pixel_met(conv, p, columns.tap(v)) : int64_t{-1};
            const int64_t byte = columns.has(v) ? columns.vector(v) * 16 : 0;
            const int64_t left = std::clamp<int64_t>(conv.inputs * kBytes - byte, 0, 16);
            EXPECT(bytes == (met >= 0 ? left : 0));
            expect_within(from, z_size);
            EXPECT(
                bytes == 0 ||
                from == example * z_size + met * z_pixel + tile.group * z_group + byte);
          }
        }
      }
      for (int thread = 0; thread < Tile::kThreads; ++thread) {
        for_each_element<Tile>(problem, tile, thread, [&](int row, int x, int64_t offset) {
          const int64_t row_size = conv.inputs * conv.taps();
          EXPECT(offsets.count(x) == 1 && offset < row_size);
          // x is the offset of this channel and tap.
          const int64_t channel = offset / conv.taps() - columns.first_vector * Tile::kElements;
          const int64_t tap = offset % conv.taps() - columns.first_tap;
          EXPECT(x == channel * columns.taps + tap);
          EXPECT(stored.insert(tile.output(problem, row) * row_size + offset).second);
        });
      }
    }
    const int64_t size = conv.groups * conv.outputs * conv.inputs * conv.taps();
    EXPECT(static_cast<int64_t>(stored.size()) == size);
    EXPECT(size == 0 || *stored.rbegin() + 1 == size);
  }
}

void test_split_examples() {
  Numbers numbers;
  for (int trial = 0; trial < 5000; ++trial) {
    const int64_t tiles = 1 + numbers.below(1 << numbers.below(12));
    const int64_t examples = 1 + numbers.below(400);
    const int64_t k_tiles = 1 + numbers.below(1 << numbers.below(10));
    const int64_t bytes = 4 + numbers.below(1 << numbers.below(25));
    const SplitExamples split = split_examples(tiles, examples, k_tiles, bytes, 132);
    EXPECT(1 <= split.splits && split.splits <= k_tiles);
    EXPECT(1 <= split.blocks && split.blocks <= examples * split.splits);
    EXPECT(split.blocks == 1 || split.blocks * bytes <= kWorkspaceBytes);
  }
}

template <int Bytes, Access Kind>
void test_gradient_tiles() {
  using Large = GradientTile<Bytes, Kind, 2, 4, 2, 1, 64 / Bytes>;
  using Small = GradientTile<Bytes, Kind, 1, 4, 1, 1, 128 / Bytes>;
  using Narrow = GradientTile<Bytes, Kind, 1, 1, 1, 4, 128 / Bytes>;
  // A processor of sm_80 has 164 KiB of shared memory, of which each block takes one for itself. It
  // holds the three blocks that the kernels with these tiles ask for.
  EXPECT(3 * (kStages * Small::kStageBytes + 1024 + 128) <= 164 * 1024);
  EXPECT(3 * (kStages * Narrow::kStageBytes + 1024 + 128) <= 164 * 1024);
  test_gradient_tile<Large>();
  test_gradient_tile<Small>();
  test_gradient_tile<Narrow>();
  test_gradient_coverage<Large>();
  test_gradient_coverage<Small>();
  test_gradient_coverage<Narrow>();
}

}  // namespace

int main() {
  test_tile<LargeTile>();
  test_tile<WarpgroupTile>();
  test_tile<NarrowWarpgroupTile>();
  test_tile<SmallTile>();
  test_tile<LargeSimtTile>();
  test_tile<NarrowTile>();
  test_tile<NarrowSimtTile>();
  test_ldmatrix_loads<LargeTile>();
  test_ldmatrix_loads<SmallTile>();
  test_ldmatrix_loads<NarrowTile>();
  test_simt_loads<LargeSimtTile>();
  test_simt_loads<NarrowSimtTile>();
  test_descriptors();
  test_matrix_view();
  test_divisors();
  test_ranges();
  test_tiles_of_blocks();
  test_k_tile_iterator();
  test_dense_heuristics();
  test_factored_heuristics();
  test_work_of_a_grouped_launch();
  test_longest_blocks_first();
  test_grouped_layers<1>(1);
  test_grouped_layers<kMaxLayers>(2);
  test_grouped_layers<kMaxLayers>(kMaxLayers);
  test_segments();
  test_strided_layout();
  test_convolution_sizes();
  test_pixels_of_convolutions();
  test_gradient_tiles<2, Access::ldmatrix>();
  test_gradient_tiles<4, Access::scalars>();
  test_gradient_tiles<4, Access::simt>();
  test_gradient_tiles<8, Access::simt>();
  test_split_examples();
  std::puts("all passed");
}
