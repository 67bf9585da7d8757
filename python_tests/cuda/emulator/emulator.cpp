#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kVectorBytes = 16;
constexpr int kWarpgroup = 128;

struct Copy {
  char* to;
  const char* from;
  int bytes;
  int filled;
  bool arrived;
};

using Product = std::function<void()>;

enum class State { kReady, kWaits, kDone };

struct Fiber {
  dim3 index;
  int number = 0;
  State state = State::kReady;
  bool started = false;
  jmp_buf resume;
  ucontext_t entry;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  Place place = Place::current();
  std::deque<std::deque<Copy>> closed;
  std::deque<Copy> open;
  std::vector<size_t> waited;  // vectors that its copies have written, and that it has not shown
  std::deque<std::deque<Product>> closed_products;
  std::deque<Product> open_products;
  bool fenced = false;
  size_t products = 0;
  int exchanges = 0;
};

struct Warp {
  char shown[2][kLanes * kPayload];
  int arrived[2] = {};
  Place place[2] = {Place::current(), Place::current()};
  std::vector<int> waiting;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, &std::free};
  int64_t shared_bytes = 0;
  std::vector<int> not_shown;  // copies to each vector
  // The matrices of all products of each warpgroup, as its first thread has had them.
  std::vector<std::vector<std::pair<uint64_t, uint64_t>>> products;
  int arrived = 0;
  Place place = Place::current();
  const std::function<void()>* thread = nullptr;
  std::string error;
};

Block* block = nullptr;
Fiber* current = nullptr;
jmp_buf scheduler;
std::mt19937 random_numbers;
// Only for the address sanitizer, which must know whose stack is in use.
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] size_t scheduler_stack_bytes = 0;
[[maybe_unused]] void* scheduler_fake_stack = nullptr;

std::string text(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

void leave_fiber([[maybe_unused]] bool forever) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(
      forever ? nullptr : &current->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  _longjmp(scheduler, 1);
}

void arrive_in_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(current->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void give_way() {
  if (_setjmp(current->resume) == 0) {
    leave_fiber(false);
  }
  arrive_in_fiber();
}

void enter() {
  arrive_in_fiber();
  try {
    (*block->thread)();
    wait_for_copies(0);
    for (const Copy& copy : current->open) {
      if (copy.bytes > 0) {
        throw std::runtime_error("a thread ended with copies that it had not closed");
      }
    }
    if (!current->open_products.empty() || !current->closed_products.empty()) {
      throw std::runtime_error("a thread ended with products that it had not waited for");
    }
  } catch (const std::exception& error) {
    if (block->error.empty()) {
      block->error = error.what();
    }
  }
  current->state = State::kDone;
  leave_fiber(true);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) == 0) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
    if (fiber.started) {
      _longjmp(fiber.resume, 1);
    }
    fiber.started = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack;
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, &enter, 0);
    setcontext(&fiber.entry);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

void perform(const Copy& copy) {
  std::memset(copy.to, 0, static_cast<size_t>(copy.filled));
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
}

size_t vector_at(const void* address) {
  const auto* const byte = static_cast<const char*>(address);
  return static_cast<size_t>(byte - block->shared.get()) / kVectorBytes;
}

char* stacks(size_t count) {
  static std::vector<char*> all;
  while (all.size() < count) {
    void* const stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) {
      throw std::bad_alloc();
    }
    all.push_back(static_cast<char*>(stack));
  }
  return all[count - 1];
}

void run_block(dim3 threads, int64_t bytes, const std::function<void()>& thread) {
  const auto count = static_cast<int>(threads.x * threads.y * threads.z);
  Block here;
  here.fibers.resize(count);
  here.warps.resize((count + kLanes - 1) / kLanes);
  here.products.resize((count + kWarpgroup - 1) / kWarpgroup);
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, static_cast<size_t>(bytes)) != 0) {
    throw std::bad_alloc();
  }
  std::memset(shared, 0xff, static_cast<size_t>(bytes));  // what nobody wrote is NaN
  here.shared.reset(static_cast<char*>(shared));
  here.shared_bytes = bytes;
  here.not_shown.resize(static_cast<size_t>(bytes) / kVectorBytes);
  here.thread = &thread;
  std::vector<int> order(count);
  for (int k = 0; k < count; ++k) {
    Fiber& fiber = here.fibers[k];
    const auto place = static_cast<unsigned>(k);
    fiber.index = {
        place % threads.x, place / threads.x % threads.y, place / (threads.x * threads.y)};
    fiber.number = k;
    fiber.stack = stacks(static_cast<size_t>(k) + 1);
    order[k] = k;
  }
  std::shuffle(order.begin(), order.end(), random_numbers);
  block = &here;
  int done = 0;
  while (done < count && here.error.empty()) {
    bool moved = false;
    for (const int k : order) {
      Fiber& fiber = here.fibers[k];
      if (fiber.state == State::kReady && here.error.empty()) {
        moved = true;
        resume(fiber);
        done += fiber.state == State::kDone ? 1 : 0;
      }
    }
    if (!moved && here.error.empty()) {
      const auto waits = std::find_if(here.fibers.begin(), here.fibers.end(), [](const Fiber& f) {
        return f.state == State::kWaits;
      });
      here.error = "threads wait at " + text(waits->place) + " for others that never come";
    }
  }
  block = nullptr;
  for (const Fiber& fiber : here.fibers) {
    if (here.error.empty() && fiber.products != here.products[fiber.number / kWarpgroup].size()) {
      here.error = "a thread has no part in a product of its warpgroup";
    }
  }
  if (!here.error.empty()) {
    throw std::runtime_error(here.error);
  }
}

}  // namespace

void run(int64_t blocks, dim3 threads, int64_t shared_bytes, const std::function<void()>& thread) {
  gridDim = dim3(static_cast<unsigned>(blocks));
  blockDim = threads;
  random_numbers.seed(0);
  for (int64_t k = 0; k < blocks; ++k) {
    blockIdx = dim3(static_cast<unsigned>(k), 0, 0);
    run_block(threads, shared_bytes, thread);
  }
}

void stop(const std::string& reason) { throw std::runtime_error(reason); }

void wait_for_block(Place place) {
  if (block->arrived == 0) {
    block->place = place;
  } else if (!same(block->place, place)) {
    stop("threads of one block wait at " + text(block->place) + " and at " + text(place));
  }
  current->place = place;
  if (++block->arrived == static_cast<int>(block->fibers.size())) {
    block->arrived = 0;
    for (Fiber& fiber : block->fibers) {
      fiber.state = State::kReady;
    }
    return;
  }
  current->state = State::kWaits;
  give_way();
}

const char* exchange(const void* shown, int bytes, Place place) {
  Warp& warp = block->warps[current->number / kLanes];
  const int turn = current->exchanges++ % 2;
  if (warp.arrived[turn] == 0) {
    warp.place[turn] = place;
  } else if (!same(warp.place[turn], place)) {
    stop("lanes of one warp exchange at " + text(warp.place[turn]) + " and at " + text(place));
  }
  if (bytes > 0) {
    std::memcpy(warp.shown[turn] + lane() * kPayload, shown, static_cast<size_t>(bytes));
  }
  current->place = place;
  if (++warp.arrived[turn] == lanes()) {
    warp.arrived[turn] = 0;
    for (const int k : warp.waiting) {
      block->fibers[k].state = State::kReady;
    }
    warp.waiting.clear();
  } else {
    warp.waiting.push_back(current->number);
    current->state = State::kWaits;
    give_way();
  }
  return warp.shown[turn];
}

int lane() { return current->number % kLanes; }

int lanes() {
  const auto count = static_cast<int>(block->fibers.size());
  return std::min(kLanes, count - current->number / kLanes * kLanes);
}

char* shared_memory() { return block->shared.get(); }
int64_t shared_bytes() { return block->shared_bytes; }

void copy_later(void* to, const void* from, int bytes, int filled) {
  const bool now = random_numbers() % 2 == 0;
  const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, filled, now};
  if (now) {
    perform(copy);
  }
  ++block->not_shown[vector_at(to)];
  current->open.push_back(copy);
}

void close_copies() { current->closed.push_back(std::exchange(current->open, {})); }

void wait_for_copies(int newer) {
  while (current->closed.size() > static_cast<size_t>(newer)) {
    for (const Copy& copy : current->closed.front()) {
      if (!copy.arrived) {
        perform(copy);
      }
      current->waited.push_back(vector_at(copy.to));
    }
    current->closed.pop_front();
  }
}

void show_copies() {
  for (const size_t vector : std::exchange(current->waited, {})) {
    --block->not_shown[vector];
  }
}

void check_shown(const void* address) {
  if (block->not_shown[vector_at(address)] != 0) {
    stop("a product of a warpgroup reads copies that were not shown to it");
  }
}

void fence_products() { current->fenced = true; }

void multiply_later(uint64_t a, uint64_t b, std::function<void()> product) {
  if (!current->fenced) {
    stop("a group of products of a warpgroup without a fence before it");
  }
  auto& all = block->products[current->number / kWarpgroup];
  if (current->products == all.size()) {
    all.emplace_back(a, b);
  } else if (all[current->products] != std::pair(a, b)) {
    stop("threads of a warpgroup multiply different matrices");
  }
  ++current->products;
  if (random_numbers() % 2 == 0) {
    product();
  } else {
    current->open_products.push_back(std::move(product));
  }
}

void close_products() {
  current->fenced = false;
  current->closed_products.push_back(std::exchange(current->open_products, {}));
}

void wait_for_products(int newer) {
  while (current->closed_products.size() > static_cast<size_t>(newer)) {
    for (const Product& product : current->closed_products.front()) {
      product();
    }
    current->closed_products.pop_front();
  }
}

}  // namespace emulator

namespace {

void configure(int64_t processors, bool tf32, bool warpgroups, int64_t workspace_bytes) {
  emulator::settings = {processors, tf32, warpgroups, workspace_bytes};
  emulator::largest_shared = 0;
}

// Since the last call of configure.
int64_t largest_shared() { return emulator::largest_shared; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(l2rw_emulated, m) {
  m.def("configure(int processors, bool tf32, bool warpgroups, int workspace_bytes) -> ()");
  m.def("largest_shared() -> int");
}

_STABLE_TORCH_LIBRARY_IMPL(l2rw_emulated, CompositeExplicitAutograd, m, C10_UID) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("largest_shared", TORCH_BOX(&largest_shared));
}
