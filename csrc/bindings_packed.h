// Packed copies of weights: what they hold, what they are made of, and how a call comes by one that is up to date.
//
// Whoever writes weights may do so behind every counter and hook, and compiled or exported programs keep their packed copy
// for good. So a copy carries a fingerprint of its weights (cpu/fingerprint.h); a call that is handed both compares the two
// and, where they differ, packs anew in place before it computes.
#pragma once

#include <pthread.h>
#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <new>

#include "bindings_common.h"
#include "cpu/fingerprint.h"

namespace repavit_bindings {

using repavit::Fingerprint;
using repavit::WeightView;

// Many calls read packed copies at a time, or one writes. A writer that waits goes before readers that come later.
class Gate {
 public:
  static Gate& instance() {
    static auto* const gate = [] {
      // A thread of the parent that was inside left its trace here, and it is not in the child.
      pthread_atfork(nullptr, nullptr, [] { new (&instance()) Gate; });
      return new Gate;
    }();
    return *gate;
  }
  void enter() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !writing_ && waiting_ == 0; });
    ++reading_;
  }
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--reading_ == 0 && waiting_ > 0) changed_.notify_all();
  }
  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    --reading_;
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !writing_ && reading_ == 0; });
    --waiting_;
    writing_ = true;
  }
  void reopen() {
    const std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    ++reading_;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t reading_ = 0, waiting_ = 0;
  bool writing_ = false;
};

// Whether memory may be written; what was mapped for reading alone may not. A system call that copies a byte onto itself
// says so, and raises no signal.
class Probe {
 public:
  Probe() = default;
  ~Probe() {
    if (ends_[0] < 0) return;
    close(ends_[0]);
    close(ends_[1]);
  }
  Probe(const Probe&) = delete;
  Probe& operator=(const Probe&) = delete;

  bool is_writable(void* memory) {
    if (ends_[0] < 0 && pipe(ends_) != 0) return false;
    return write(ends_[1], memory, 1) == 1 && read(ends_[0], memory, 1) == 1;
  }

 private:
  int ends_[2] = {-1, -1};
};

// As long as one lives, no packed copy is written by another call. At most one in a thread, and whoever holds one waits for
// no other lock.
class Reading {
 public:
  Reading() { Gate::instance().enter(); }
  ~Reading() { Gate::instance().leave(); }
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

  // Runs `write` while no call reads, this one included.
  template <class Write>
  void pause(const Write& write) {
    struct Closed {
      Closed() { Gate::instance().close(); }
      ~Closed() { Gate::instance().reopen(); }
    } closed;
    written = true;
    write();
  }

  Probe probe;
  bool written = false;  // whether a copy was written, so that ones met before may have been meanwhile
  bool anew = false;     // to pack whatever is met: one of the weights of a model was written, so others may be
};

// Whether a tensor begins as packed copies of one kind do.
inline bool is_packed_as(const Tensor& packed, const char (&magic)[8]) {
  const bool readable = packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                        packed.numel() >= static_cast<int64_t>(sizeof(magic));
  if (readable) check_memory("packed", packed);
  return readable && std::memcmp(packed.const_data_ptr(), magic, sizeof(magic)) == 0;
}

// Raises where a copy is of int8 and the call is not, or the other way round.
inline void check_packed_kind(bool wanted, bool given) {
  STD_TORCH_CHECK(wanted == given, "packed: holds weights ", given ? "of int8" : "in floats",
                  ", which is not what quantize says; pack the weights again");
}

// The weights of a packed copy, in the order in which its pack operator takes them; each a matrix or absent.
using Weights = std::initializer_list<const Tensor*>;

inline const Tensor* pointer(const MaybeTensor& t) { return t ? &*t : nullptr; }

inline WeightView view_of(const Tensor& w) {
  const auto element = static_cast<int64_t>(w.element_size());
  return {static_cast<const char*>(w.const_data_ptr()), w.size(0), w.size(1), w.stride(0) * element,
          w.stride(1) * element, element};
}

inline uint64_t fingerprint_of(Weights weights) {
  Fingerprint fingerprint;
  for (const Tensor* w : weights) {
    if (w != nullptr) fingerprint.add(view_of(*w));
  }
  return fingerprint.value();
}

// Last eight bytes of every header.
constexpr size_t kFingerprintAt = 56;
static_assert(offsetof(repavit::PackedFfnHeader, fingerprint) == kFingerprintAt &&
                  offsetof(repavit::PackedAttentionHeader, fingerprint) == kFingerprintAt &&
                  offsetof(repavit::PackedMatrixHeader, fingerprint) == kFingerprintAt,
              "the fingerprint stands in the same place");

inline uint64_t fingerprint_in(const void* packed) {
  uint64_t value = 0;
  std::memcpy(&value, static_cast<const char*>(packed) + kFingerprintAt, sizeof(value));
  return value;
}

inline void set_fingerprint(const Tensor& packed, uint64_t value) {
  std::memcpy(static_cast<char*>(packed.mutable_data_ptr()) + kFingerprintAt, &value, sizeof(value));
}

// Packs into `packed`; `write` is handed its memory. The fingerprint is that of before, and it is set when all is done: of
// weights that change meanwhile a later call makes another copy.
template <class Write>
void pack_into(const Tensor& packed, Weights weights, const Write& write) {
  const uint64_t fingerprint = fingerprint_of(weights);
  set_fingerprint(packed, Fingerprint::kUnknown);
  write(packed.mutable_data_ptr());
  set_fingerprint(packed, fingerprint);
}

// `packed`, a valid copy for weights of these shapes, once it holds these weights. Where it may not be written, a new one.
template <class Write>
Tensor up_to_date(Reading& reading, const Tensor& packed, Weights weights, const Write& write) {
  const auto holds = [&] {
    const uint64_t known = fingerprint_in(packed.const_data_ptr());
    return known == Fingerprint::kOfNothing || (!reading.anew && known == fingerprint_of(weights));
  };
  if (holds()) return packed;
  bool writable = true;
  reading.pause([&] {
    if (holds()) return;
    writable = reading.probe.is_writable(packed.mutable_data_ptr());
    if (writable) pack_into(packed, weights, write);
  });
  if (writable) return packed;
  Tensor fresh = new_packed("packed", packed.numel());
  pack_into(fresh, weights, write);
  return fresh;
}

}  // namespace repavit_bindings
