// PyTorch's stable ABI, as far as the bindings use it: its C functions, declared here, and what stands on them.
//
// These functions have kept their signatures since torch 2.10 and promise to. So nothing of PyTorch is needed to build the
// library: no headers, hence no installed torch in an isolated build, and one binary for every torch from 2.10 on. The
// names are those of torch/csrc/stable, which could take this header's place.
//
// A value crosses the ABI as 64 bits: a number or a bool in the lowest bytes; a tensor, string or list as a handle that the
// receiver owns; an optional as null, or a pointer to such 64 bits on the heap.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

using StableIValue = uint64_t;
struct AtenTensorOpaque;
struct StableListOpaque;
struct StringOpaque;
struct TorchLibraryOpaque;
using AtenTensorHandle = AtenTensorOpaque*;

extern "C" {  // each returns 0, or an error that PyTorch has printed
int32_t aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
int32_t aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* same);
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, AtenTensorHandle* made);
int32_t aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dims);
int32_t aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* numel);
int32_t aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
int32_t aoti_torch_get_size(AtenTensorHandle tensor, int64_t dim, int64_t* size);
int32_t aoti_torch_get_stride(AtenTensorHandle tensor, int64_t dim, int64_t* stride);
int32_t aoti_torch_get_storage_offset(AtenTensorHandle tensor, int64_t* elements);
int32_t aoti_torch_get_storage_size(AtenTensorHandle tensor, int64_t* bytes);
int32_t aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
int32_t aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* device_type);
int32_t aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* is);
int32_t torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data);
int32_t torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data);

int32_t torch_new_list_reserve_size(size_t size, StableListOpaque** list);
int32_t torch_list_size(StableListOpaque* list, size_t* size);
int32_t torch_list_get_item(StableListOpaque* list, size_t index, StableIValue* item);
int32_t torch_list_push_back(StableListOpaque* list, StableIValue item);
int32_t torch_delete_list(StableListOpaque* list);
int32_t torch_string_length(StringOpaque* string, size_t* length);
int32_t torch_string_c_str(StringOpaque* string, const char** text);
int32_t torch_delete_string(StringOpaque* string);

int32_t torch_get_num_threads(uint32_t* threads);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                           void (*body)(int64_t begin, int64_t end, void* context), void* context);
int32_t torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t abi_version);
int32_t aoti_torch_library_init_impl(const char* space, const char* key, const char* file, uint32_t line,
                                     TorchLibraryOpaque** library);
int32_t torch_library_impl(TorchLibraryOpaque* library, const char* name,
                           void (*kernel)(StableIValue* stack, uint64_t inputs, uint64_t outputs),
                           uint64_t abi_version);
int32_t aoti_torch_delete_library_object(TorchLibraryOpaque* library);

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_memory_format_contiguous_format();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
size_t aoti_torch_dtype_element_size(int32_t dtype);
}

namespace torch::headeronly {

enum class ScalarType : int8_t { Byte, Char, Short, Int, Long, Half, Float, Double, Bool, BFloat16, Undefined };

inline const char* toString(ScalarType type) {
  constexpr const char* kNames[] = {"Byte",  "Char",   "Short", "Int",      "Long",         "Half",
                                    "Float", "Double", "Bool",  "BFloat16", "another dtype"};
  return kNames[static_cast<int>(type)];
}

}  // namespace torch::headeronly

namespace torch::stable {

namespace detail {

constexpr uint64_t kAbiVersion = uint64_t{0x020a} << 48;  // torch 2.10: what values look like when they cross

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream text(std::ios_base::out);  // the constructor without arguments is of gcc 9
  (text << ... << words);
  throw std::runtime_error(text.str());
}

}  // namespace detail

#define STD_TORCH_CHECK(condition, ...)                        \
  do {                                                         \
    if (!(condition)) torch::stable::detail::fail(__VA_ARGS__); \
  } while (false)

#define TORCH_ERROR_CODE_CHECK(call)                                                             \
  do {                                                                                           \
    if ((call) != 0) torch::stable::detail::fail("PyTorch failed in ", #call, "; its reason is printed above"); \
  } while (false)

// A reference to a tensor.
class Tensor {
 public:
  Tensor() = default;  // none
  explicit Tensor(AtenTensorHandle handle) : handle_(handle, aoti_torch_delete_tensor_object) {}  // takes it over

  AtenTensorHandle get() const { return handle_.get(); }
  int64_t dim() const { return asked<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return asked<int64_t>(aoti_torch_get_numel); }
  int64_t storage_offset() const { return asked<int64_t>(aoti_torch_get_storage_offset); }
  bool is_contiguous() const { return asked<bool>(aoti_torch_is_contiguous); }
  bool is_cpu() const { return asked<int32_t>(aoti_torch_get_device_type) == aoti_torch_device_type_cpu(); }
  size_t element_size() const { return aoti_torch_dtype_element_size(asked<int32_t>(aoti_torch_get_dtype)); }
  const void* const_data_ptr() const { return asked<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return asked<void*>(torch_get_mutable_data_ptr); }

  int64_t size(int64_t dim) const { return asked_of(aoti_torch_get_size, dim); }
  int64_t stride(int64_t dim) const { return asked_of(aoti_torch_get_stride, dim); }

  struct Sizes {  // borrowed from the tensor
    const int64_t* numbers;
    int64_t count;
    const int64_t* data() const { return numbers; }
    const int64_t* begin() const { return numbers; }
    const int64_t* end() const { return numbers + count; }
  };
  Sizes sizes() const { return {asked<int64_t*>(aoti_torch_get_sizes), dim()}; }

  headeronly::ScalarType scalar_type() const {
    using headeronly::ScalarType;
    const int32_t dtype = asked<int32_t>(aoti_torch_get_dtype);
    if (dtype == aoti_torch_dtype_float32()) return ScalarType::Float;
    if (dtype == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
    if (dtype == aoti_torch_dtype_float16()) return ScalarType::Half;
    if (dtype == aoti_torch_dtype_float64()) return ScalarType::Double;
    if (dtype == aoti_torch_dtype_uint8()) return ScalarType::Byte;
    if (dtype == aoti_torch_dtype_bool()) return ScalarType::Bool;
    if (dtype == aoti_torch_dtype_int64()) return ScalarType::Long;
    if (dtype == aoti_torch_dtype_int32()) return ScalarType::Int;
    if (dtype == aoti_torch_dtype_int16()) return ScalarType::Short;
    return dtype == aoti_torch_dtype_int8() ? ScalarType::Char : ScalarType::Undefined;
  }

 private:
  template <class T>
  T asked(int32_t (*question)(AtenTensorHandle, T*)) const {
    T answer{};
    TORCH_ERROR_CODE_CHECK(question(get(), &answer));
    return answer;
  }

  int64_t asked_of(int32_t (*question)(AtenTensorHandle, int64_t, int64_t*), int64_t dim) const {
    int64_t answer = 0;
    TORCH_ERROR_CODE_CHECK(question(get(), dim, &answer));
    return answer;
  }

  std::shared_ptr<AtenTensorOpaque> handle_;
};

namespace detail {

// ---- T ⇄ 64 bits

template <class T>
struct Crossing {
  static_assert(std::is_arithmetic_v<T> || std::is_pointer_v<T>);
  static T in(StableIValue value) {
    T result;
    std::memcpy(&result, &value, sizeof(result));  // little-endian, as are all processors that PyTorch is built for
    return result;
  }
  static StableIValue out(T value) {
    StableIValue result = 0;
    std::memcpy(&result, &value, sizeof(value));
    return result;
  }
};

template <>
struct Crossing<Tensor> {
  static Tensor in(StableIValue value) { return Tensor(Crossing<AtenTensorHandle>::in(value)); }
  static StableIValue out(const Tensor& tensor) {
    AtenTensorHandle same = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &same));
    return Crossing<AtenTensorHandle>::out(same);
  }
};

template <class T>
struct Crossing<std::optional<T>> {
  static std::optional<T> in(StableIValue value) {
    const std::unique_ptr<StableIValue> inside(Crossing<StableIValue*>::in(value));
    return inside ? std::optional<T>(Crossing<T>::in(*inside)) : std::nullopt;
  }
};

template <>
struct Crossing<std::string> {
  static std::string in(StableIValue value) {
    const std::unique_ptr<StringOpaque, int32_t (*)(StringOpaque*)> string(Crossing<StringOpaque*>::in(value),
                                                                          torch_delete_string);
    size_t length = 0;
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(string.get(), &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(string.get(), &text));
    return std::string(text, length);
  }
};

template <class T>
struct Crossing<std::vector<T>> {
  using List = std::unique_ptr<StableListOpaque, int32_t (*)(StableListOpaque*)>;

  static std::vector<T> in(StableIValue value) {
    const List list(Crossing<StableListOpaque*>::in(value), torch_delete_list);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list.get(), &size));
    std::vector<T> result;
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list.get(), i, &item));
      result.push_back(Crossing<T>::in(item));
    }
    return result;
  }
  static StableIValue out(const std::vector<T>& values) {
    StableListOpaque* made = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(values.size(), &made));
    List list(made, torch_delete_list);
    for (const T& value : values) TORCH_ERROR_CODE_CHECK(torch_list_push_back(made, Crossing<T>::out(value)));
    return Crossing<StableListOpaque*>::out(list.release());
  }
};

// ---- A function as the dispatcher calls it: arguments from the stack, the result onto it.

template <auto function, class Signature = decltype(function)>
struct Boxed;

template <auto function, class Result, class... Arguments>
struct Boxed<function, Result (*)(Arguments...)> {
  static void call(StableIValue* stack, uint64_t, uint64_t) {
    const auto all = std::index_sequence_for<Arguments...>();
    if constexpr (std::is_void_v<Result>) {
      on(stack, all);
    } else {
      stack[0] = Crossing<Result>::out(on(stack, all));
    }
  }

 private:
  template <size_t... i>
  static Result on(StableIValue* stack, std::index_sequence<i...>) {
    std::tuple<std::decay_t<Arguments>...> arguments{Crossing<std::decay_t<Arguments>>::in(stack[i])...};
    return std::apply(function, std::move(arguments));
  }
};

}  // namespace detail

// ---- Kernels for operators that are defined elsewhere, registered while the library is loaded.

class StableLibrary {
 public:
  StableLibrary(const char* space, const char* key, const char* file, uint32_t line) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl(space, key, file, line, &library_));
  }
  StableLibrary(const StableLibrary&) = delete;
  StableLibrary& operator=(const StableLibrary&) = delete;
  ~StableLibrary() { aoti_torch_delete_library_object(library_); }

  StableLibrary& impl(const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    TORCH_ERROR_CODE_CHECK(torch_library_impl(library_, name, kernel, detail::kAbiVersion));
    return *this;
  }

 private:
  TorchLibraryOpaque* library_ = nullptr;
};

struct StableRegistration {
  StableRegistration(void (*fill)(StableLibrary&), const char* space, const char* key, const char* file, uint32_t line)
      : library(space, key, file, line) {
    fill(library);
  }
  StableLibrary library;
};

#define TORCH_BOX(function) (torch::stable::detail::Boxed<function>::call)
#define STABLE_TORCH_LIBRARY_IMPL(space, key, library)                                                       \
  static void fill_##space##_##key(torch::stable::StableLibrary&);                                           \
  static const torch::stable::StableRegistration registration_##space##_##key(&fill_##space##_##key, #space, \
                                                                              #key, __FILE__, __LINE__);     \
  static void fill_##space##_##key(torch::stable::StableLibrary& library)

// ---- What libtorch does for us.

inline Tensor contiguous(const Tensor& tensor) {
  StableIValue stack[] = {detail::Crossing<Tensor>::out(tensor),
                          detail::Crossing<int32_t>::out(aoti_torch_memory_format_contiguous_format())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::contiguous", "", stack, detail::kAbiVersion));
  return detail::Crossing<Tensor>::in(stack[0]);
}

inline Tensor flatten(const Tensor& tensor, int64_t first, int64_t last) {
  StableIValue stack[] = {detail::Crossing<Tensor>::out(tensor), detail::Crossing<int64_t>::out(first),
                          detail::Crossing<int64_t>::out(last)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::flatten", "using_ints", stack, detail::kAbiVersion));
  return detail::Crossing<Tensor>::in(stack[0]);
}

inline uint32_t get_num_threads() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return threads;
}

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const auto call = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Body*>(context))(first, last);
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, call, const_cast<Body*>(&body)));
}

}  // namespace torch::stable
