// Comparisons.
#include "lanes.h"

namespace isa {

namespace {

// Comparisons: a mask of active lanes. v_cmpx sets EXEC; on gfx9 the mask as well.

void write_comparison(Wave& wave, const Instruction& i, uint64_t mask) {
  const bool sets_exec = i.name.starts_with("v_cmpx_");
  if (!sets_exec || wave.arch == Arch::cdna) write_mask(wave, i.dst, mask);
  if (sets_exec) wave.set_exec(mask);
}

template <class Test>
void compare_lanes(Wave& wave, const Instruction& i, Test test) {
  bool holds[MAX_LANES];
  each_lane(wave, [&](int lane) { holds[lane] = test(lane); });
  uint64_t mask = 0;
  for (int lane = 0; lane < wave.lanes; ++lane) mask |= static_cast<uint64_t>(holds[lane]) << lane;
  write_comparison(wave, i, mask & wave.exec());
}

template <class Number, auto F>
void compare_32(Wave& wave, const Instruction& i) {
  expect_no_float_modifiers(i);
  Lanes buffers[2];
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_bits(wave, i, i.src1, 1, buffers[1]);
  compare_lanes(wave, i, [&](int lane) {
    return F(static_cast<Number>(a[lane]), static_cast<Number>(b[lane]));
  });
}

template <class Number, auto F>
void compare_16(Wave& wave, const Instruction& i) {
  Lanes a, b;
  read_16(wave, i, i.src0, 0, false, a);
  read_16(wave, i, i.src1, 1, false, b);
  compare_lanes(wave, i, [&](int lane) {
    return F(static_cast<Number>(a.lane[lane]), static_cast<Number>(b.lane[lane]));
  });
}

template <class Number, auto F>
void compare_64(Wave& wave, const Instruction& i) {
  uint64_t a[MAX_LANES], b[MAX_LANES];
  read_64(wave, i, i.src0, 0, a);
  read_64(wave, i, i.src1, 1, b);
  compare_lanes(wave, i, [&](int lane) {
    return F(static_cast<Number>(a[lane]), static_cast<Number>(b[lane]));
  });
}

template <auto F>
void compare_f32(Wave& wave, const Instruction& i) {
  Lanes buffers[2];
  const uint32_t* a = read_f32(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* b = read_f32(wave, i, i.src1, 1, buffers[1]);
  compare_lanes(wave, i, [&](int lane) { return F(as_float(a[lane]), as_float(b[lane])); });
}

template <auto F>
void compare_f16(Wave& wave, const Instruction& i) {
  Lanes a, b;
  read_16(wave, i, i.src0, 0, true, a);
  read_16(wave, i, i.src1, 1, true, b);
  compare_lanes(wave, i, [&](int lane) {
    return F(from_f16(static_cast<uint16_t>(a.lane[lane])),
             from_f16(static_cast<uint16_t>(b.lane[lane])));
  });
}

// Bits of the second source: signalling NaN, NaN, then from -inf to +inf.
bool is_of_class(float x, uint32_t classes) {
  const bool is_negative = std::signbit(x);
  const auto side = [&](int negative, int positive) { return is_negative ? negative : positive; };
  int which = side(3, 8);
  if (is_nan(x)) {
    which = as_bits(x) >> 22 & 1;
  } else if (std::isinf(x)) {
    which = side(2, 9);
  } else if (x == 0) {
    which = side(5, 6);
  } else if (!exponent_of(x)) {
    which = side(4, 7);
  }
  return classes >> which & 1;
}

void compare_class_f32(Wave& wave, const Instruction& i) {
  Lanes buffers[2];
  const uint32_t* a = read_bits(wave, i, i.src0, 0, buffers[0]);
  const uint32_t* classes = read_bits(wave, i, i.src1, 1, buffers[1]);
  if (i.src0.abs) fail("abs of a class test is not interpreted");
  const uint32_t flip = i.src0.neg ? 0x80000000 : 0;
  compare_lanes(wave, i,
                [&](int lane) { return is_of_class(as_float(a[lane] ^ flip), classes[lane]); });
}

constexpr auto LESS = [](auto a, auto b) { return a < b; };
constexpr auto EQUAL = [](auto a, auto b) { return a == b; };
constexpr auto LESS_EQUAL = [](auto a, auto b) { return a <= b; };
constexpr auto GREATER = [](auto a, auto b) { return a > b; };
constexpr auto NOT_EQUAL = [](auto a, auto b) { return a != b; };
constexpr auto GREATER_EQUAL = [](auto a, auto b) { return a >= b; };
constexpr auto LESS_GREATER = [](auto a, auto b) { return a < b || a > b; };
constexpr auto ORDERED = [](auto a, auto b) { return a == a && b == b; };
constexpr auto UNORDERED = [](auto a, auto b) { return a != a || b != b; };
constexpr auto NOT_GREATER_EQUAL = [](auto a, auto b) { return !(a >= b); };
constexpr auto NOT_LESS_GREATER = [](auto a, auto b) { return !(a < b || a > b); };
constexpr auto NOT_GREATER = [](auto a, auto b) { return !(a > b); };
constexpr auto NOT_LESS_EQUAL = [](auto a, auto b) { return !(a <= b); };
constexpr auto NOT_LESS = [](auto a, auto b) { return !(a < b); };

// Names like "v_cmp_lt_i32", in static memory.
const char* comparison_name(const char* prefix, const char* test, const char* type) {
  return (new std::string(std::string(prefix) + test + "_" + type))->c_str();
}

void add_comparison(std::vector<Entry>& table, const char* test, const char* type,
                    Handler handler) {
  table.push_back({comparison_name("v_cmp_", test, type), handler});
  table.push_back({comparison_name("v_cmpx_", test, type), handler});
}

template <auto F>
void add_integer_comparisons(std::vector<Entry>& table, const char* test) {
  add_comparison(table, test, "i16", compare_16<int16_t, F>);
  add_comparison(table, test, "u16", compare_16<uint16_t, F>);
  add_comparison(table, test, "i32", compare_32<int32_t, F>);
  add_comparison(table, test, "u32", compare_32<uint32_t, F>);
  add_comparison(table, test, "i64", compare_64<int64_t, F>);
  add_comparison(table, test, "u64", compare_64<uint64_t, F>);
}

template <auto F>
void add_float_comparisons(std::vector<Entry>& table, const char* test) {
  add_comparison(table, test, "f16", compare_f16<F>);
  add_comparison(table, test, "f32", compare_f32<F>);
}

}  // namespace

std::vector<Entry> comparisons() {
  std::vector<Entry> table;
  add_integer_comparisons<LESS>(table, "lt");
  add_integer_comparisons<EQUAL>(table, "eq");
  add_integer_comparisons<LESS_EQUAL>(table, "le");
  add_integer_comparisons<GREATER>(table, "gt");
  add_integer_comparisons<NOT_EQUAL>(table, "ne");
  add_integer_comparisons<GREATER_EQUAL>(table, "ge");
  add_float_comparisons<LESS>(table, "lt");
  add_float_comparisons<EQUAL>(table, "eq");
  add_float_comparisons<LESS_EQUAL>(table, "le");
  add_float_comparisons<GREATER>(table, "gt");
  add_float_comparisons<LESS_GREATER>(table, "lg");
  add_float_comparisons<GREATER_EQUAL>(table, "ge");
  add_float_comparisons<ORDERED>(table, "o");
  add_float_comparisons<UNORDERED>(table, "u");
  add_float_comparisons<NOT_GREATER_EQUAL>(table, "nge");
  add_float_comparisons<NOT_LESS_GREATER>(table, "nlg");
  add_float_comparisons<NOT_GREATER>(table, "ngt");
  add_float_comparisons<NOT_LESS_EQUAL>(table, "nle");
  add_float_comparisons<NOT_EQUAL>(table, "neq");
  add_float_comparisons<NOT_LESS>(table, "nlt");
  add_comparison(table, "class", "f32", compare_class_f32);
  return table;
}

}  // namespace isa
