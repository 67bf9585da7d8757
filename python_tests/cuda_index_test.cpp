// The index logic of the CUDA kernels, on the host: what is covered once and only once, and whole
// kernels thread by thread, with the tensor core instructions emulated as PTX defines them.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <type_traits>
#include <vector>

#include "cuda/layers.h"
#include "cuda/places.h"
#include "cuda/row_sums.h"
#include "cuda/sheets.h"
#include "cuda/tile_index.h"
#include "cuda/tile_plan.h"

namespace {

using namespace l2rw::cuda;

#define EXPECT(condition)                                                           \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                 \
    }                                                                               \
  } while (0)

using LargeTile = MatrixTile<128, 128, 64, 32>;
using SmallTile = MatrixTile<64, 64, 32, 32>;
using FlatTile = PlainTile<64, 128>;

// Small numbers, the same in every run, whose sums are exact in every type used here.
struct Numbers {
  uint64_t state = 1;
  int64_t below(int64_t bound) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(bound));
  }
  int64_t small() { return below(7) - 3; }
};

// Vectors that a warp reads at once lie in different banks, eight lanes at a time.
void expect_no_conflict(const std::vector<int>& offsets) {
  EXPECT(offsets.size() == 8);
  std::map<int, int> banks;  // of 16 bytes, of the line they are in
  for (const int offset : offsets) {
    const auto [place, is_new] = banks.insert({offset / kVectorBytes % 8, offset});
    EXPECT(is_new || place->second == offset);  // the same address is read once for all
  }
}

template <class Tile>
void test_tile() {
  std::set<std::pair<int, int>> sums;
  std::set<int> copied;
  const Operand left{nullptr, 0, Tile::kRows, kLineBytes};
  const Operand right{nullptr, 0, Tile::kColumns, kLineBytes};
  for (int thread = 0; thread < Tile::kThreads; ++thread) {
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int row = Tile::row(thread, r);
      EXPECT(0 <= row && row < Tile::kRows);
      // The lanes that add up a row are neighbours, and the first of them writes it.
      EXPECT(row == Tile::row(thread / Tile::kLanesAcross * Tile::kLanesAcross, r));
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const int column = Tile::column(thread, c);
        EXPECT(0 <= column && column < Tile::kColumns);
        EXPECT(sums.insert({row, column}).second);
        EXPECT(
            column ==
            Tile::column(thread, c / Tile::kAdjacent * Tile::kAdjacent) + c % Tile::kAdjacent);
      }
    }
    EXPECT(Tile::warp_across(thread) < Tile::kWarpsAcross);
    for_each_vector<Tile>(thread, left, 0, right, 0, 0, [&](int offset, const char*, int bytes) {
      EXPECT(offset % kVectorBytes == 0 && 0 <= offset && offset < Tile::kStageBytes);
      EXPECT(bytes == kVectorBytes);
      EXPECT(copied.insert(offset).second);
    });
  }
  EXPECT(sums.size() == size_t{Tile::kRows} * Tile::kColumns);
  EXPECT(copied.size() == size_t{Tile::kStageBytes} / kVectorBytes);
}

template <class Tile>
void test_matrix_loads() {
  for (int thread = 0; thread < Tile::kThreads; thread += 8) {
    for (int step = 0; step < kLineVectors; step += 2) {
      for (int b = 0; b < Tile::kLeftBlocks; ++b) {
        std::vector<int> offsets;
        for (int lane = thread; lane < thread + 8; ++lane) {
          offsets.push_back(shared_offset(Tile::left_row(lane, b), step + Tile::left_vector(lane)));
        }
        expect_no_conflict(offsets);
      }
      for (int b = 0; b < Tile::kRightBlocks; ++b) {
        std::vector<int> offsets;
        for (int lane = thread; lane < thread + 8; ++lane) {
          offsets.push_back(shared_offset(
              Tile::kRows + Tile::right_row(lane, b), step + Tile::right_vector(lane)));
        }
        expect_no_conflict(offsets);
      }
    }
  }
}

void test_plain_loads() {
  for (int thread = 0; thread < FlatTile::kThreads; thread += 8) {
    for (int vector = 0; vector < kLineVectors; ++vector) {
      std::vector<int> rows;
      std::vector<int> columns;
      for (int lane = thread; lane < thread + 8; ++lane) {
        rows.push_back(shared_offset(FlatTile::row(lane, 1), vector));
        columns.push_back(shared_offset(FlatTile::kRows + FlatTile::column(lane, 1), vector));
      }
      expect_no_conflict(rows);
      expect_no_conflict(columns);
    }
  }
}

void test_operand() {
  const Operand operand{nullptr, 48, 3, 40};
  EXPECT(TileRows(operand, 1, 0)(1).bytes == 16);
  EXPECT(TileRows(operand, 1, 32)(1).bytes == 8);
  EXPECT(TileRows(operand, 1, 48)(1).bytes == 0);
  EXPECT(TileRows(operand, 1, 0)(2).bytes == 0);
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

void test_places_of_blocks() {
  for (int64_t rows = 1; rows < 40; rows += 3) {
    for (int64_t columns = 1; columns < 30; columns += 2) {
      std::set<std::pair<int64_t, int64_t>> places;
      for (int64_t block = 0; block < rows * columns; ++block) {
        const TilePlace place = place_of_block(block, rows, columns);
        EXPECT(0 <= place.row && place.row < rows && 0 <= place.column && place.column < columns);
        EXPECT(places.insert({place.row, place.column}).second);
      }
    }
  }
}

void test_walk() {
  for (int64_t columns = 1; columns < 9; ++columns) {
    for (int64_t chunks = 1; chunks < 12; ++chunks) {
      for (int64_t splits = 1; splits <= chunks; ++splits) {
        for (int64_t groups = 1; groups <= columns * splits; ++groups) {
          std::set<std::pair<int64_t, int64_t>> steps;
          for (int64_t group = 0; group < groups; ++group) {
            Walk walk(split_range(columns * splits, groups, group), splits, chunks);
            EXPECT(!walk.done());
            for (; !walk.done(); walk.next()) {
              EXPECT(steps.insert({walk.column_tile(), walk.chunk}).second);
            }
          }
          EXPECT(static_cast<int64_t>(steps.size()) == columns * chunks);
        }
      }
    }
  }
}

void test_dense_plans() {
  Numbers numbers;
  const TileSize large = size_of<LargeTile>();
  const TileSize small = size_of<SmallTile>();
  for (int trial = 0; trial < 20000; ++trial) {
    const int64_t rows = 1 + numbers.below(1 << numbers.below(24));
    const int64_t columns = 1 + numbers.below(1 << numbers.below(16));
    const int64_t chunks = 1 + numbers.below(1 << numbers.below(9));
    const int64_t processors = 1 + numbers.below(150);
    const int64_t bytes = numbers.below(2) == 0 ? 4 : 8;
    const ProductPlan plan = plan_dense(rows, columns, chunks, large, small, processors, bytes);
    const TileSize tile = plan.large ? large : small;
    EXPECT(plan.row_tiles == ceil_div(rows, tile.rows));
    EXPECT(plan.column_tiles == ceil_div(columns, tile.columns));
    EXPECT(1 <= plan.groups && plan.groups <= plan.column_tiles * plan.splits);
    EXPECT(plan.groups == 1 || plan.groups * rows * bytes <= kWorkspaceBytes);
    EXPECT(1 <= plan.splits && plan.splits <= chunks);
  }
}

void test_factored_plans() {
  Numbers numbers;
  for (int trial = 0; trial < 20000; ++trial) {
    const int64_t processors = 1 + numbers.below(150);
    const int64_t bytes = numbers.below(2) == 0 ? 4 : 8;
    const TileSize large = bytes == 4 ? size_of<LargeTile>() : size_of<FlatTile>();
    const TileSize small = bytes == 4 ? size_of<SmallTile>() : size_of<FlatTile>();
    std::vector<FactoredSize> layers(static_cast<size_t>(1 + numbers.below(kMostLayers)));
    for (FactoredSize& layer : layers) {
      layer = {
          1 + numbers.below(1 << numbers.below(24)),
          1 + numbers.below(1 << numbers.below(16)),
          1 + numbers.below(1 << numbers.below(9)),
          1 + numbers.below(1 << numbers.below(9))};
    }
    const std::vector<ProductPlan> plans = plan_factored(layers, large, small, processors, bytes);
    const FactoredWorkspace workspace(layers, plans, small);
    EXPECT(plans.size() == layers.size());
    int64_t most = 0;  // bytes
    int64_t end = 0;
    int64_t large_tiles = 0;
    for (size_t l = 0; l < plans.size(); ++l) {
      const ProductPlan& plan = plans[l];
      const TileSize tile = plan.large ? large : small;
      EXPECT(plan.row_tiles == ceil_div(layers[l].rows, tile.rows));
      EXPECT(plan.column_tiles == ceil_div(layers[l].columns, tile.columns));
      EXPECT(1 <= plan.groups && plan.groups <= plan.column_tiles);
      const int64_t tiles = plan.row_tiles * plan.column_tiles;
      EXPECT(workspace.partial[l] == end);
      if (plan.z_splits > 0) {
        EXPECT(!plan.large && plan.groups == 1 && tiles < processors);
        const int64_t g_splits = plan.splits - plan.z_splits;
        EXPECT(plan.z_splits <= layers[l].z_chunks);
        EXPECT(1 <= g_splits && g_splits <= layers[l].g_chunks);
        EXPECT(plan.blocks() == tiles * plan.splits && plan.tiles_of_block() == 1);
        end += plan.splits * tiles * tile.rows * tile.columns;
        most += plan.splits * tiles * tile.rows * tile.columns * bytes;
      } else {
        EXPECT(plan.splits == 1 && plan.blocks() == plan.row_tiles * plan.groups);
        EXPECT(plan.tiles_of_block() * plan.groups >= plan.column_tiles);
        most += plan.groups > 1 ? plan.groups * layers[l].rows * bytes : 0;
      }
      large_tiles += plan.large ? tiles : 0;
    }
    EXPECT(most <= kWorkspaceBytes);
    EXPECT(large_tiles == 0 || large_tiles >= processors);
    EXPECT(workspace.parts == end);
    for (size_t l = 0; l < plans.size(); ++l) {
      EXPECT(workspace.row_sums[l] == end);
      end += plans[l].groups * layers[l].rows;
    }
    EXPECT(workspace.size == end);
  }
}

// All layers together fill the processors: none waits for a block that is much longer than its
// share.
void test_shares_of_a_group() {
  const TileSize large = size_of<LargeTile>();
  const TileSize small = size_of<SmallTile>();
  const FactoredSize layer{256, 64, 16, 16};
  for (const size_t count : {1, 3, 12, 20}) {
    const std::vector<FactoredSize> layers(count, layer);
    int64_t blocks = 0;
    for (const ProductPlan& plan : plan_factored(layers, large, small, 132, 4)) {
      EXPECT(plan.z_splits > 0);
      blocks += plan.blocks();
    }
    // Two stages are the least that a block is started for.
    EXPECT(blocks == (count == 1 ? 64 : count == 3 ? 192 : count == 12 ? 288 : 320));
  }
  // A deep layer is split beside one that fills the processors, a layer like that one is not.
  const std::vector<ProductPlan> plans =
      plan_factored({{16384, 1024, 4, 4}, {64, 64, 64, 64}}, large, small, 132, 4);
  EXPECT(plans[0].large && plans[0].z_splits == 0 && plans[1].z_splits > 0);
  // Tiles that would be half empty are small ones.
  EXPECT(!plan_factored({{65536, 64, 16, 16}}, large, small, 132, 4)[0].large);
  EXPECT(plan_factored({{65536, 128, 16, 16}}, large, small, 132, 4)[0].large);
}

void test_longest_blocks_first() {
  const std::vector<FactoredSize> layers{
      {64, 64, 1, 1}, {64, 64, 9, 9}, {64, 64, 3, 3}, {64, 64, 9, 9}};
  const std::vector<ProductPlan> plans(4, ProductPlan{false, 1, 1, 1, 1});
  EXPECT((longest_blocks_first(layers, plans) == std::vector<size_t>{1, 3, 2, 0}));
}

template <int Capacity>
void test_layer_table(int layers) {
  Numbers numbers;
  for (int trial = 0; trial < 50; ++trial) {
    LayerTable<int, Capacity> table;
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

void test_sheets() {
  for (const int64_t vectors : {1, 2, 3, 17, 64, 200, 256, 257, 5000}) {
    const SheetThreads threads = sheet_threads(vectors);
    EXPECT(threads.across * threads.down == kSheetThreads);
    EXPECT(threads.across >= vectors || threads.across == kSheetThreads);
    for (const int64_t outer : {1, 2, 300, 100000}) {
      for (const int64_t sheets : {1, 100, 100000}) {
        const SheetParts parts = parts_of_sheet(sheets, outer, threads, 132);
        int64_t next = 0;
        for (unsigned part = 0; part < parts.count; ++part) {
          const Range range = parts.range(part, outer);
          EXPECT(range.begin == next && range.begin < range.end);
          next = range.end;
        }
        EXPECT(next == outer);
      }
    }
  }
  EXPECT(fits_vectors(64, 4, {8, 4, 1}, 8, 4));
  EXPECT(!fits_vectors(64, 4, {8, 4, 1}, 6, 4));
  EXPECT(!fits_vectors(64, 4, {8, 3, 1}, 8, 4));
  EXPECT(!fits_vectors(64, 4, {9, 4, 1}, 8, 4));
  EXPECT(!fits_vectors(68, 4, {8, 4, 1}, 8, 4));
  EXPECT(!fits_vectors(64, 4, {8, 4, 2}, 8, 4));
}

void test_places() {
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
    const auto places = Places::of(sizes, strides);
    EXPECT(places.has_value());
    EXPECT(!whole || places->dims == 1);
    std::vector<int64_t> at(sizes.size(), 0);
    for (int64_t k = 0; k < run; ++k) {
      int64_t offset = 0;
      for (size_t d = 0; d < sizes.size(); ++d) {
        offset += at[d] * strides[d];
      }
      EXPECT(places->offset(k) == offset);
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
  EXPECT(!Places::of(nine, apart).has_value());
}

// Kernels, thread by thread

// ldmatrix: lane 8 k + r addresses row r of matrix k, and lane l receives the four bytes at 4 (l %
// 4) of row l / 4 of every matrix.
using Fragments = uint32_t[32][4];

void load_matrices(const char* const (&addresses)[32], Fragments& matrices) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int k = 0; k < 4; ++k) {
      std::memcpy(&matrices[lane][k], addresses[8 * k + lane / 4] + lane % 4 * 4, 4);
    }
  }
}

template <class T>
double element(uint32_t packed, int k) {
  T values[4 / sizeof(T)];
  std::memcpy(values, &packed, 4);
  return static_cast<double>(values[k]);
}

// mma.m16n8 of 32 bytes of depth, k16 of two bytes or k8 of four. With q = lane / 4 and p = lane %
// 4: a0, a1, a2, a3 are rows q, q + 8, q, q + 8, the first two of the first half of the depth; b0,
// b1 column q, first and second half; each holds the numbers at 4 p bytes of its half. The results
// are rows q, q, q + 8, q + 8 and columns 2 p, 2 p + 1, 2 p, 2 p + 1.
template <class T>
void multiply_accumulate(
    double (&d)[32][4], const Fragments& a, const uint32_t (&b0)[32], const uint32_t (&b1)[32]) {
  constexpr int kPerRegister = 4 / static_cast<int>(sizeof(T));
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = 0;
      for (int half = 0; half < 2; ++half) {
        for (int p = 0; p < 4; ++p) {
          const uint32_t left = a[row % 8 * 4 + p][row / 8 + 2 * half];
          const uint32_t right = half == 0 ? b0[column * 4 + p] : b1[column * 4 + p];
          for (int k = 0; k < kPerRegister; ++k) {
            sum += element<T>(left, k) * element<T>(right, k);
          }
        }
      }
      d[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] += sum;
    }
  }
}

template <class Tile>
struct Thread {
  Sums<Tile, double> sums{};
};

template <class T, class Tile>
void multiply_stage(const char* stage, std::vector<Thread<Tile>>& threads) {
  if constexpr (std::is_same_v<Tile, FlatTile>) {
    for (int thread = 0; thread < Tile::kThreads; ++thread) {
      multiply_plainly<Tile, T>(stage, thread, threads[thread].sums);
    }
  } else {
    for (int warp = 0; warp < Tile::kThreads; warp += 32) {
      for (int step = 0; step < kLineVectors; step += 2) {
        Fragments left[Tile::kLeftBlocks];
        Fragments right[Tile::kRightBlocks];
        const char* addresses[32];
        for (int b = 0; b < Tile::kLeftBlocks; ++b) {
          for (int lane = 0; lane < 32; ++lane) {
            const int thread = warp + lane;
            addresses[lane] =
                stage + shared_offset(Tile::left_row(thread, b), step + Tile::left_vector(thread));
          }
          load_matrices(addresses, left[b]);
        }
        for (int b = 0; b < Tile::kRightBlocks; ++b) {
          for (int lane = 0; lane < 32; ++lane) {
            const int thread = warp + lane;
            addresses[lane] = stage + shared_offset(
                                          Tile::kRows + Tile::right_row(thread, b),
                                          step + Tile::right_vector(thread));
          }
          load_matrices(addresses, right[b]);
        }
        for (int i = 0; i < Tile::kLeftBlocks; ++i) {
          for (int j = 0; j < 2 * Tile::kRightBlocks; ++j) {
            double d[32][4];
            uint32_t b0[32];
            uint32_t b1[32];
            for (int lane = 0; lane < 32; ++lane) {
              const auto& sums = threads[warp + lane].sums;
              d[lane][0] = sums[2 * i][2 * j];
              d[lane][1] = sums[2 * i][2 * j + 1];
              d[lane][2] = sums[2 * i + 1][2 * j];
              d[lane][3] = sums[2 * i + 1][2 * j + 1];
              b0[lane] = right[j / 2][lane][j % 2 * 2];
              b1[lane] = right[j / 2][lane][j % 2 * 2 + 1];
            }
            multiply_accumulate<T>(d, left[i], b0, b1);
            for (int lane = 0; lane < 32; ++lane) {
              auto& sums = threads[warp + lane].sums;
              sums[2 * i][2 * j] = d[lane][0];
              sums[2 * i][2 * j + 1] = d[lane][1];
              sums[2 * i + 1][2 * j] = d[lane][2];
              sums[2 * i + 1][2 * j + 1] = d[lane][3];
            }
          }
        }
      }
    }
  }
}

// The pipeline of product.cuh. A stage that is read before it is loaded, or loaded before it was
// read, holds numbers that spoil every sum.
template <class T, class Tile, class Load, class Result>
void multiply(Walk walk, int most_chunks, const Load& load, std::vector<Result>& results) {
  std::vector<char> shared(size_t{kStages} * Tile::kStageBytes, '\x55');
  std::vector<Thread<Tile>> threads(Tile::kThreads);
  Walk ahead = walk;
  const auto load_ahead = [&](int stage) {
    char* const base = shared.data() + stage * Tile::kStageBytes;
    std::memset(base, 0x55, Tile::kStageBytes);
    if (!ahead.done()) {
      for (int thread = 0; thread < Tile::kThreads; ++thread) {
        load(thread, ahead, [&](int offset, const char* source, int bytes) {
          std::memset(base + offset, 0, kVectorBytes);
          if (bytes > 0) {
            std::memcpy(base + offset, source, static_cast<size_t>(bytes));
          }
        });
      }
      ahead.next();
    }
  };
  for (int stage = 0; stage < kStages - 1; ++stage) {
    load_ahead(stage);
  }
  int chunks = 0;
  int stage = 0;
  for (; !walk.done(); walk.next()) {
    load_ahead(stage == 0 ? kStages - 1 : stage - 1);
    multiply_stage<T, Tile>(shared.data() + stage * Tile::kStageBytes, threads);
    ++chunks;
    bool taken = false;
    for (int thread = 0; thread < Tile::kThreads; ++thread) {
      if (chunks == most_chunks || results[thread].complete(walk)) {
        results[thread].take(walk, threads[thread].sums);
        clear<Tile, double>(threads[thread].sums);
        taken = true;
      }
    }
    chunks = taken ? 0 : chunks;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

// store_rows of product.cuh: the lanes of a row, then its warps.
template <class Tile, class Result>
void add_rows(const std::vector<Result>& results, double* to, int64_t count) {
  for (int thread = 0; thread < Tile::kThreads; ++thread) {
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      const int row = Tile::row(thread, r);
      if (row < count) {
        to[row] += results[thread].rows[r];
      }
    }
  }
}

template <class T>
struct Matrix {
  int64_t rows;
  int64_t width;
  int64_t pitch;
  std::vector<T> values;

  Matrix(int64_t rows, int64_t width, Numbers& numbers)
      : rows(rows),
        width(width),
        pitch(ceil_div(width * sizeof(T), kVectorBytes) * kVectorBytes / sizeof(T)),
        values(static_cast<size_t>(rows * pitch), T(77)) {  // padding that must not be used
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < width; ++k) {
        values[r * pitch + k] = static_cast<T>(numbers.small());
      }
    }
  }
  double at(int64_t r, int64_t k) const { return static_cast<double>(values[r * pitch + k]); }
  Operand operand() const {
    return {
        reinterpret_cast<const char*>(values.data()),
        pitch * static_cast<int64_t>(sizeof(T)),
        rows,
        width * static_cast<int64_t>(sizeof(T))};
  }
};

template <class T>
double dot(const Matrix<T>& a, int64_t r, const Matrix<T>& b, int64_t s) {
  double sum = 0;
  for (int64_t k = 0; k < a.width; ++k) {
    sum += a.at(r, k) * b.at(s, k);
  }
  return sum;
}

template <class T, class Tile>
void test_factored(int64_t rows, int64_t columns, int64_t i, int64_t o, bool bias, bool split) {
  Numbers numbers;
  const Matrix<T> z(rows, i, numbers);
  const Matrix<T> g(rows, o, numbers);
  const Matrix<T> z_clean(columns, i, numbers);
  const Matrix<T> g_clean(columns, o, numbers);
  const int64_t z_chunks = chunks_of(i * sizeof(T));
  const int64_t g_chunks = chunks_of(o * sizeof(T));
  const int64_t row_tiles = ceil_div(rows, Tile::kRows);
  const int64_t column_tiles = ceil_div(columns, Tile::kColumns);
  std::vector<double> sums(static_cast<size_t>(rows), 0);
  const auto load_part = [&](bool is_z, const TilePlace& place) {
    return [&, is_z, place](int thread, const Walk& step, const auto& copy) {
      for_each_vector<Tile>(
          thread,
          (is_z ? z : g).operand(),
          place.row * Tile::kRows,
          (is_z ? z_clean : g_clean).operand(),
          place.column * Tile::kColumns,
          int64_t{step.chunk} * kLineBytes,
          copy);
    };
  };
  if (!split) {
    const int64_t groups = (column_tiles + 1) / 2;
    for (int64_t block = 0; block < row_tiles * groups; ++block) {
      const TilePlace place = place_of_block(block, row_tiles, groups);
      const int64_t first = place.row * Tile::kRows;
      std::vector<FactoredSums<Tile, double>> results(
          Tile::kThreads, FactoredSums<Tile, double>(z_chunks, bias ? 1 : 0));
      multiply<T, Tile>(
          Walk(split_range(column_tiles, groups, place.column), 1, z_chunks + g_chunks),
          2,
          [&](int thread, const Walk& step, const auto& copy) {
            const bool is_z = step.chunk < z_chunks;
            for_each_vector<Tile>(
                thread,
                (is_z ? z : g).operand(),
                first,
                (is_z ? z_clean : g_clean).operand(),
                step.column_tile() * Tile::kColumns,
                (is_z ? step.chunk : step.chunk - z_chunks) * kLineBytes,
                copy);
          },
          results);
      add_rows<Tile>(results, sums.data() + first, rows - first);
    }
  } else {
    const int64_t z_splits = (z_chunks + 1) / 2;
    const int64_t g_splits = g_chunks;
    const int64_t padded_rows = row_tiles * Tile::kRows;
    const int64_t padded_columns = column_tiles * Tile::kColumns;
    std::vector<double> partial(
        static_cast<size_t>((z_splits + g_splits) * padded_rows * padded_columns), 1e300);
    for (int64_t split_index = 0; split_index < z_splits + g_splits; ++split_index) {
      const bool is_z = split_index < z_splits;
      const int64_t part = is_z ? split_index : split_index - z_splits;
      for (int64_t tile = 0; tile < row_tiles * column_tiles; ++tile) {
        const TilePlace place = place_of_block(tile, row_tiles, column_tiles);
        std::vector<GramSums<Tile, double>> results(Tile::kThreads);
        multiply<T, Tile>(
            Walk({part, part + 1}, is_z ? z_splits : g_splits, is_z ? z_chunks : g_chunks),
            2,
            load_part(is_z, place),
            results);
        for (int thread = 0; thread < Tile::kThreads; ++thread) {
          for (int r = 0; r < Tile::kThreadRows; ++r) {
            for (int c = 0; c < Tile::kThreadColumns; ++c) {
              double& at = partial[partial_place(
                  split_index,
                  place.row * Tile::kRows + Tile::row(thread, r),
                  place.column * Tile::kColumns + Tile::column(thread, c),
                  padded_rows,
                  padded_columns)];
              EXPECT(at == 1e300);
              at = results[thread].total[r][c];
            }
          }
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        double products[2] = {bias ? 1.0 : 0.0, 0};
        for (int64_t k = 0; k < z_splits + g_splits; ++k) {
          products[k >= z_splits] +=
              partial[partial_place(k, row, column, padded_rows, padded_columns)];
        }
        sums[row] += products[0] * products[1];
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    double exact = 0;
    for (int64_t column = 0; column < columns; ++column) {
      exact += (dot(z, row, z_clean, column) + (bias ? 1 : 0)) * dot(g, row, g_clean, column);
    }
    EXPECT(sums[row] == exact);
  }
}

template <class T, class Tile>
void test_dense(int64_t rows, int64_t i, int64_t o, bool bias, int64_t splits, int64_t groups) {
  Numbers numbers;
  const Matrix<T> z(rows, i, numbers);
  const Matrix<T> g(rows, o, numbers);
  const Matrix<T> direction(o, i, numbers);
  const Matrix<T> direction_bias(1, o, numbers);
  const int64_t chunks = chunks_of(i * sizeof(T));
  const int64_t row_tiles = ceil_div(rows, Tile::kRows);
  const int64_t units = ceil_div(o, Tile::kColumns) * splits;
  EXPECT(splits <= chunks && groups <= units);
  std::vector<double> sums(static_cast<size_t>(rows), 0);
  for (int64_t block = 0; block < row_tiles * groups; ++block) {
    const TilePlace place = place_of_block(block, row_tiles, groups);
    const int64_t first = place.row * Tile::kRows;
    const auto gradient = [&](int row, int64_t column, double (&values)[Tile::kAdjacent]) {
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values[k] = first + row < rows && column + k < o ? g.at(first + row, column + k) : 0;
      }
    };
    const auto offset = [&](int64_t column) {
      return bias && column < o ? direction_bias.at(0, column) : 0;
    };
    using Result = DenseSums<Tile, double, decltype(gradient), decltype(offset)>;
    std::vector<Result> results;
    for (int thread = 0; thread < Tile::kThreads; ++thread) {
      results.emplace_back(thread, gradient, offset);
    }
    multiply<T, Tile>(
        Walk(split_range(units, groups, place.column), splits, chunks),
        2,
        [&](int thread, const Walk& step, const auto& copy) {
          for_each_vector<Tile>(
              thread,
              z.operand(),
              first,
              direction.operand(),
              step.column_tile() * Tile::kColumns,
              int64_t{step.chunk} * kLineBytes,
              copy);
        },
        results);
    add_rows<Tile>(results, sums.data() + first, rows - first);
  }
  for (int64_t row = 0; row < rows; ++row) {
    double exact = 0;
    for (int64_t column = 0; column < o; ++column) {
      exact += g.at(row, column) *
               (dot(z, row, direction, column) + (bias ? direction_bias.at(0, column) : 0));
    }
    EXPECT(sums[row] == exact);
  }
}

// int16_t stands for the types of two bytes, float for TF32.
template <class T, class Tile>
void test_products() {
  for (const bool bias : {false, true}) {
    for (const bool split : {false, true}) {
      test_factored<T, Tile>(1, 1, 1, 1, bias, split);
      test_factored<T, Tile>(70, 5, 0, 3, bias, split);
      test_factored<T, Tile>(65, 130, 33, 200, bias, split);
      test_factored<T, Tile>(130, 129, 300, 17, bias, split);
    }
    test_dense<T, Tile>(1, 1, 1, bias, 1, 1);
    test_dense<T, Tile>(3, 0, 10, bias, 1, 1);
    test_dense<T, Tile>(131, 40, 259, bias, 1, 2);
    test_dense<T, Tile>(66, 500, 130, bias, 3, 4);
  }
}

}  // namespace

int main() {
  test_tile<LargeTile>();
  test_tile<SmallTile>();
  test_tile<FlatTile>();
  test_matrix_loads<LargeTile>();
  test_matrix_loads<SmallTile>();
  test_plain_loads();
  test_operand();
  test_ranges();
  test_places_of_blocks();
  test_walk();
  test_dense_plans();
  test_factored_plans();
  test_shares_of_a_group();
  test_longest_blocks_first();
  test_layer_table<1>(1);
  test_layer_table<kMostLayers>(2);
  test_layer_table<kMostLayers>(kMostLayers);
  test_sheets();
  test_places();
  test_products<int16_t, LargeTile>();
  test_products<int16_t, SmallTile>();
  test_products<float, LargeTile>();
  test_products<float, SmallTile>();
  test_products<double, FlatTile>();
  std::puts("all passed");
}
