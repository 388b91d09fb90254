// Matrix products: MFMA on CDNA, WMMA on RDNA. D = A B + C, with A of M x K elements, B of K x N,
// C and D of M x N, for one block or several; each matrix is spread over the lanes of a wave.
//
// Layouts: AMD's matrix instruction calculator 1.3.2 (ROCm/amd_matrix_instruction_calculator,
// 2ef9189, May 2025), and IREE's IREEGPUAttrs.cpp (iree-org/iree, 0046349) for gfx950, which the
// calculator lacks. What all have in common: a row of B, C or D, and a column of A, lies in
// adjacent lanes of one register (or of one half of it). So the innermost loop runs over lanes.
//
// Sums: here each element of D is a sum in f64, C first, rounded once to D's type. A card
// multiplies exactly as well, but AMD does not document how it sums; measurements
// (microsoft/MMA-Sim, c785138) find sums of few products that are rounded or cut off one after the
// other, differently on each CDNA. Results differ from a card's in the last bits of the largest
// summand. Products of f64 alone are added and rounded one by one, in the order of K, as was
// measured.
//
// Denormals: kept, and the MODE register plays no part, with one exception. On gfx90a MFMA of f16
// and bf16 takes denormals (and -0) in A, B and C for +0, and turns denormal results into zeros of
// their sign; that of f32 and f64 does not, and gfx908 and gfx942 keep them all. So say PyTorch's
// "Numerical accuracy" ("Reduced Precision FP16 and BF16 GEMMs ... on AMD Instinct MI200 devices"),
// MIOpen's "MI200 MFMA Behavior Specifics", and MMA-Sim's measurements. Sums inside of an
// instruction that are denormal become zeros there too; here only the last one does. No document
// was found for WMMA and for gfx950.
#include <immintrin.h>

#include <cmath>

#include "operands.h"

namespace isa {

namespace {

enum class Type { f16, bf16, f32, f64 };

struct Shape {
  int m, n, k, blocks = 1;
};

// Where a row or column of a matrix begins: N or M lanes from `lane` on hold it.
struct Place {
  int element;  // of those that a lane holds, in the order of registers, lower halves first
  int lane;
};

// CDNA, f32 results. Groups of lanes share out K; rows of the result go to groups four at a time.
template <Shape S>
struct MfmaLayout {
  static constexpr Shape SHAPE = S;
  static constexpr int NUM_LANES = 64, GROUPS = NUM_LANES / (S.m * S.blocks);
  static constexpr int NUM_INPUTS = S.k / GROUPS;  // elements of A, and of B, in a lane
  static constexpr int NUM_OUTPUTS = S.m * S.n * S.blocks / NUM_LANES;

  static constexpr Place input(int block, int k) {
    return {k % NUM_INPUTS, S.m * (block + S.blocks * (k / NUM_INPUTS))};
  }
  static constexpr Place output(int block, int row) {
    constexpr int GROUPS_OF_ROWS = NUM_LANES / S.n;
    const int four = (block * S.m + row) / 4;
    return {4 * (four / GROUPS_OF_ROWS) + row % 4, S.n * (four % GROUPS_OF_ROWS)};
  }
};

// CDNA, f64: rows go to groups one by one, and blocks lie side by side.
template <Shape S>
struct MfmaF64Layout : MfmaLayout<S> {
  static constexpr Place output(int block, int row) {
    constexpr int GROUPS_OF_ROWS = 64 / (S.n * S.blocks);
    return {row / GROUPS_OF_ROWS, S.n * (S.blocks * (row % GROUPS_OF_ROWS) + block)};
  }
};

// RDNA3: lanes 16 to 31 repeat A and B; even rows of the result lie in lanes 0 to 15, odd ones in
// the others.
struct Rdna3Layout {
  static constexpr Shape SHAPE = {16, 16, 16};
  static constexpr int NUM_LANES = 32, NUM_INPUTS = 16, NUM_OUTPUTS = 8;

  static constexpr Place input(int, int k) { return {k, 0}; }
  static constexpr Place output(int, int row) { return {row / 2, 16 * (row % 2)}; }
};

// RDNA4: the halves of the wave take turns in K by fours, and share the rows of the result.
struct Rdna4Layout {
  static constexpr Shape SHAPE = {16, 16, 16};
  static constexpr int NUM_LANES = 32, NUM_INPUTS = 8, NUM_OUTPUTS = 8;

  static constexpr Place input(int, int k) { return {4 * (k / 8) + k % 4, 16 * (k / 4 % 2)}; }
  static constexpr Place output(int, int row) { return {row % 8, 16 * (row / 8)}; }
};

// [element, lane]
template <int NUM_ELEMENTS, int NUM_LANES>
struct Elements {
  alignas(64) double values[NUM_ELEMENTS][NUM_LANES];
};

template <class Layout>
using Inputs = Elements<Layout::NUM_INPUTS, Layout::NUM_LANES>;
template <class Layout>
using Sums = Elements<Layout::NUM_OUTPUTS, Layout::NUM_LANES>;

// Four columns at a time; a row's sums stay in processor registers.
using Vector = __m256d;
constexpr int VECTOR = 4;

template <class Layout>
void multiply(const Inputs<Layout>& a, const Inputs<Layout>& b, Sums<Layout>& sums) {
  constexpr Shape S = Layout::SHAPE;
  constexpr int NUM_VECTORS = S.n / VECTOR;
  for (int block = 0; block < S.blocks; ++block) {
    for (int row = 0; row < S.m; ++row) {
      const Place to = Layout::output(block, row);
      double* out = sums.values[to.element] + to.lane;
      Vector sum[NUM_VECTORS];
#pragma GCC unroll 8
      for (int j = 0; j < NUM_VECTORS; ++j) sum[j] = _mm256_loadu_pd(out + VECTOR * j);
      for (int k = 0; k < S.k; ++k) {
        const Place from = Layout::input(block, k);
        const Vector factor = _mm256_set1_pd(a.values[from.element][from.lane + row]);
        const double* factors = b.values[from.element] + from.lane;
#pragma GCC unroll 8
        for (int j = 0; j < NUM_VECTORS; ++j) {
          sum[j] = _mm256_fmadd_pd(factor, _mm256_loadu_pd(factors + VECTOR * j), sum[j]);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < NUM_VECTORS; ++j) _mm256_storeu_pd(out + VECTOR * j, sum[j]);
    }
  }
}

// Numbers and bits

// The same as from_f16, in operations that can be vectorized.
float widened_f16(uint32_t bits) {
  const uint32_t shifted = (bits & 0x7fff) << 13;  // the exponent is too small by 127 - 15
  const uint32_t finite = as_bits(as_float(shifted) * 0x1p112f);
  const uint32_t magnitude = shifted >= 0x0f800000 ? shifted | 0x7f800000 : finite;
  return as_float(magnitude | (bits & 0x8000) << 16);
}

template <Type T>
double widened(uint32_t bits) {
  return T == Type::f16 ? widened_f16(bits) : as_float(bits << (T == Type::bf16 ? 16 : 0));
}

// To nearest, ties to even, in one step: an f32 in between gets an odd last bit, which says that it
// is not exact.
uint16_t narrowed_bf16(double x) {
  const auto nearest = static_cast<float>(x);
  if (nearest == x || is_nan(nearest)) return to_bf16(nearest);
  const uint32_t towards_zero = as_bits(nearest) - (std::fabs(nearest) > std::fabs(x));
  return to_bf16(as_float(towards_zero | 1));
}

template <Type T>
uint32_t narrowed(double x) {
  if constexpr (T == Type::f16) return to_f16(x);
  if constexpr (T == Type::bf16) return narrowed_bf16(x);
  return as_bits(static_cast<float>(x));
}

constexpr bool has_16_bits(Type type) { return type == Type::f16 || type == Type::bf16; }

// Registers

// How numbers of 16 bits lie in registers: two in each, or one in this half of each.
enum class Packing { pairs, low, high };

constexpr int num_registers(Type type, int num_elements, Packing packing = Packing::pairs) {
  if (type == Type::f64) return 2 * num_elements;
  return has_16_bits(type) && packing == Packing::pairs ? num_elements / 2 : num_elements;
}

struct Part {
  int index, shift;  // of the register; of the number in it
};

template <Type T>
constexpr Part part_of(int element, Packing packing) {
  if (!has_16_bits(T)) return {element, 0};
  if (packing == Packing::pairs) return {element / 2, 16 * (element % 2)};
  return {element, packing == Packing::high ? 16 : 0};
}

void check_registers(const Operand& operand, int count) {
  if (!operand.is_vector()) fail("a matrix is not in vector registers");
  if (operand.count != count) fail("a matrix has another number of registers");
  if (operand.index % AGPR + count > AGPR) fail("a matrix goes beyond the last register");
}

// What happens to the bits of A and B on their way.
struct Change {
  bool flush_denormals = false;
  uint32_t flip_even = 0, flip_odd = 0;  // the sign bit, where elements with that index are negated
};

template <Type T, int NUM_ELEMENTS, int NUM_LANES>
void load(const Wave& wave, const Operand& operand, Elements<NUM_ELEMENTS, NUM_LANES>& to,
          Packing packing = Packing::pairs, Change change = {}) {
  check_registers(operand, num_registers(T, NUM_ELEMENTS, packing));
  const Lanes* registers = wave.v + operand.index;
  for (int element = 0; element < NUM_ELEMENTS; ++element) {
    double* values = to.values[element];
    if constexpr (T == Type::f64) {
      const uint32_t *low = registers[2 * element].lane, *high = registers[2 * element + 1].lane;
      for (int lane = 0; lane < NUM_LANES; ++lane) {
        values[lane] = as_double(low[lane] | static_cast<uint64_t>(high[lane]) << 32);
      }
      continue;
    }
    constexpr uint32_t EXPONENT = T == Type::f16 ? 0x7c00 : 0x7f80;
    const Part part = part_of<T>(element, packing);
    const uint32_t* bits = registers[part.index].lane;
    const uint32_t keep = has_16_bits(T) ? 0xffff : 0xffffffff;
    const uint32_t flip = element % 2 ? change.flip_odd : change.flip_even;
    const uint32_t least = change.flush_denormals ? 1 : 0;
    for (int lane = 0; lane < NUM_LANES; ++lane) {
      const uint32_t value = bits[lane] >> part.shift & keep;
      const bool is_kept = (value & EXPONENT) >= least;
      values[lane] = widened<T>((is_kept ? value : 0) ^ flip);
    }
  }
}

template <Type T, int NUM_ELEMENTS, int NUM_LANES>
void load_sums(const Wave& wave, const Operand& operand, Elements<NUM_ELEMENTS, NUM_LANES>& to,
               Packing packing = Packing::pairs) {
  if (operand.kind != Kind::constant) return load<T>(wave, operand, to, packing);
  const double value = T == Type::f64 ? as_double(operand.value)
                                      : widened<T>(static_cast<uint32_t>(operand.value));
  for (auto& values : to.values) std::fill_n(values, NUM_LANES, value);
}

// To all lanes: MFMA ignores EXEC.
template <Type T, int NUM_ELEMENTS, int NUM_LANES>
void store(Wave& wave, const Operand& operand, const Elements<NUM_ELEMENTS, NUM_LANES>& from,
           Packing packing = Packing::pairs) {
  check_registers(operand, num_registers(T, NUM_ELEMENTS, packing));
  Lanes* registers = wave.v + operand.index;
  for (int element = 0; element < NUM_ELEMENTS; ++element) {
    const double* values = from.values[element];
    if constexpr (T == Type::f64) {
      for (int lane = 0; lane < NUM_LANES; ++lane) {
        const uint64_t bits = as_bits(values[lane]);
        registers[2 * element].lane[lane] = static_cast<uint32_t>(bits);
        registers[2 * element + 1].lane[lane] = static_cast<uint32_t>(bits >> 32);
      }
      continue;
    }
    const Part part = part_of<T>(element, packing);
    const uint32_t mask = has_16_bits(T) ? 0xffffu << part.shift : 0xffffffff;
    uint32_t* to = registers[part.index].lane;
    for (int lane = 0; lane < NUM_LANES; ++lane) {
      to[lane] = (to[lane] & ~mask) | narrowed<T>(values[lane]) << part.shift;
    }
  }
}

// CDNA

template <class Sums>
void flush_denormals(Sums& sums, bool keeps_sign) {
  for (auto& values : sums.values) {
    for (double& value : values) {
      const double zero = keeps_sign ? std::copysign(0.0, value) : 0.0;
      value = std::fabs(value) < 0x1p-126 ? zero : value;
    }
  }
}

template <class Layout, Type IN, Type OUT>
void mfma(Wave& wave, const Instruction& i) {
  if (wave.lanes != Layout::NUM_LANES) fail("MFMA needs a wave of 64");
  if (i.cbsz || i.abid || i.blgp) fail("cbsz, abid and blgp are not interpreted");
  const Launch& launch = *wave.group->launch;
  const bool flushes =
      has_16_bits(IN) && launch.chip.name == "gfx90a" && launch.settings.flushes_in_matrices;
  const Change change = {.flush_denormals = flushes};
  Inputs<Layout> a, b;
  Sums<Layout> sums;
  load<IN>(wave, i.src0, a, Packing::pairs, change);
  load<IN>(wave, i.src1, b, Packing::pairs, change);
  load_sums<OUT>(wave, i.src2, sums);
  if (flushes) flush_denormals(sums, false);
  multiply<Layout>(a, b, sums);
  if (flushes) flush_denormals(sums, true);
  store<OUT>(wave, i.dst, sums);
}

template <Type IN, int M, int N, int K, int BLOCKS = 1>
constexpr Handler MFMA = mfma<MfmaLayout<Shape{M, N, K, BLOCKS}>, IN, Type::f32>;

template <int M, int N, int K, int BLOCKS = 1>
constexpr Handler MFMA_F64 = mfma<MfmaF64Layout<Shape{M, N, K, BLOCKS}>, Type::f64, Type::f64>;

// RDNA

// neg_lo negates elements of A and B in lower halves and C, neg_hi those in upper halves; of C it
// takes the absolute value, before neg_lo.
Change change_of(const Instruction& i, int source) {
  return {.flip_even = (i.neg_lo >> source & 1) * 0x8000u,
          .flip_odd = (i.neg_hi >> source & 1) * 0x8000u};
}

template <class Sums>
void modify_sums(const Instruction& i, Sums& sums) {
  const bool is_absolute = i.neg_hi & 4, is_negated = i.neg_lo & 4;
  if (!is_absolute && !is_negated) return;
  for (auto& values : sums.values) {
    for (double& value : values) {
      if (is_absolute) value = std::fabs(value);
      if (is_negated) value = -value;
    }
  }
}

void check_repeated(const Wave& wave, const Operand& operand) {
  for (int k = 0; k < operand.count; ++k) {
    const uint32_t* lanes = wave.v[operand.index + k].lane;
    if (std::memcmp(lanes, lanes + 16, 16 * sizeof *lanes)) {
      fail("lanes 16 to 31 do not repeat lanes 0 to 15 of v" + std::to_string(operand.index + k));
    }
  }
}

template <class Layout, Type IN, Type OUT>
void wmma(Wave& wave, const Instruction& i, Packing packing) {
  Inputs<Layout> a, b;
  Sums<Layout> sums;
  load<IN>(wave, i.src0, a, Packing::pairs, change_of(i, 0));
  load<IN>(wave, i.src1, b, Packing::pairs, change_of(i, 1));
  load_sums<OUT>(wave, i.src2, sums, packing);
  modify_sums(i, sums);
  multiply<Layout>(a, b, sums);
  store<OUT>(wave, i.dst, sums, packing);
}

// On RDNA3 16-bit results fill one half of each register, which op_sel[2] chooses for C and D, and
// leave the other as it was; on RDNA4 there are two in each. What happens where EXEC has zeros is
// said in no document that could be had; so that is refused.
template <Type IN, Type OUT>
void wmma(Wave& wave, const Instruction& i) {
  const bool is_rdna3 = wave.arch == Arch::rdna3;
  if (wave.lanes != 32) fail("WMMA is interpreted in waves of 32 only");
  if (wave.exec() != 0xffffffff) fail("WMMA with lanes switched off is not interpreted");
  if (i.clamp) fail("clamp is not interpreted");
  if (i.opsel & ~(is_rdna3 && has_16_bits(OUT) ? 4 : 0)) fail("op_sel is not interpreted");
  if (!is_rdna3) return wmma<Rdna4Layout, IN, OUT>(wave, i, Packing::pairs);
  check_repeated(wave, i.src0);
  check_repeated(wave, i.src1);
  wmma<Rdna3Layout, IN, OUT>(wave, i, i.opsel & 4 ? Packing::high : Packing::low);
}

constexpr Type F16 = Type::f16, BF16 = Type::bf16, F32 = Type::f32;

}  // namespace

// K of bf16 was half as large until gfx90a, which has both kinds: the larger ones are its
// v_mfma_..._1k. gfx950 alone has 16x16x32 and 32x32x16.
extern const std::vector<Entry> MATRIX = {
    {"v_mfma_f32_32x32x1_2b_f32", MFMA<F32, 32, 32, 1, 2>},
    {"v_mfma_f32_16x16x1_4b_f32", MFMA<F32, 16, 16, 1, 4>},
    {"v_mfma_f32_4x4x1_16b_f32", MFMA<F32, 4, 4, 1, 16>},
    {"v_mfma_f32_32x32x2_f32", MFMA<F32, 32, 32, 2>},
    {"v_mfma_f32_16x16x4_f32", MFMA<F32, 16, 16, 4>},
    {"v_mfma_f32_32x32x4_2b_f16", MFMA<F16, 32, 32, 4, 2>},
    {"v_mfma_f32_16x16x4_4b_f16", MFMA<F16, 16, 16, 4, 4>},
    {"v_mfma_f32_4x4x4_16b_f16", MFMA<F16, 4, 4, 4, 16>},
    {"v_mfma_f32_32x32x8_f16", MFMA<F16, 32, 32, 8>},
    {"v_mfma_f32_16x16x16_f16", MFMA<F16, 16, 16, 16>},
    {"v_mfma_f32_32x32x16_f16", MFMA<F16, 32, 32, 16>},
    {"v_mfma_f32_16x16x32_f16", MFMA<F16, 16, 16, 32>},
    {"v_mfma_f32_32x32x2_2b_bf16", MFMA<BF16, 32, 32, 2, 2>},
    {"v_mfma_f32_16x16x2_4b_bf16", MFMA<BF16, 16, 16, 2, 4>},
    {"v_mfma_f32_4x4x2_16b_bf16", MFMA<BF16, 4, 4, 2, 16>},
    {"v_mfma_f32_32x32x4_bf16", MFMA<BF16, 32, 32, 4>},
    {"v_mfma_f32_16x16x8_bf16", MFMA<BF16, 16, 16, 8>},
    {"v_mfma_f32_32x32x4_2b_bf16", MFMA<BF16, 32, 32, 4, 2>},
    {"v_mfma_f32_16x16x4_4b_bf16", MFMA<BF16, 16, 16, 4, 4>},
    {"v_mfma_f32_4x4x4_16b_bf16", MFMA<BF16, 4, 4, 4, 16>},
    {"v_mfma_f32_32x32x8_bf16", MFMA<BF16, 32, 32, 8>},
    {"v_mfma_f32_16x16x16_bf16", MFMA<BF16, 16, 16, 16>},
    {"v_mfma_f32_32x32x16_bf16", MFMA<BF16, 32, 32, 16>},
    {"v_mfma_f32_16x16x32_bf16", MFMA<BF16, 16, 16, 32>},
    {"v_mfma_f64_16x16x4_f64", MFMA_F64<16, 16, 4>},
    {"v_mfma_f64_4x4x4_4b_f64", MFMA_F64<4, 4, 4, 4>},
    {"v_wmma_f32_16x16x16_f16", wmma<F16, F32>},
    {"v_wmma_f32_16x16x16_bf16", wmma<BF16, F32>},
    {"v_wmma_f16_16x16x16_f16", wmma<F16, F16>},
    {"v_wmma_bf16_16x16x16_bf16", wmma<BF16, BF16>},
};

}  // namespace isa
