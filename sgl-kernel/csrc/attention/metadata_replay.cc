// A replay as a Python builtin of one argument, bound to its plans. An operator boxes, dispatches and unboxes its
// arguments: beside a GPU that takes the host 2 to 3 us, as long as the launch itself, and 20 us where other work has
// pushed that much code out of its caches.
//
// Made without Python's headers, which a machine that builds this need not have: what is used is of Python's stable
// ABI, and found in the process that loads the library.
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

#include "attention/plan_runs.h"
#include "sgl_kernel_ops.h"

extern "C" {
struct PyObject;
struct PyThreadState;
struct PyMethodDef {
  const char* name;
  PyObject* (*function)(PyObject* self, PyObject* argument);
  int flags;
  const char* doc;
};
#define SGLK_OF_PYTHON __attribute__((weak))
SGLK_OF_PYTHON PyObject* PyTuple_GetItem(PyObject* tuple, std::ptrdiff_t index);  // borrowed
SGLK_OF_PYTHON void* PyLong_AsVoidPtr(PyObject* number);
SGLK_OF_PYTHON long long PyLong_AsLongLong(PyObject* number);
SGLK_OF_PYTHON PyObject* PyErr_Occurred();
SGLK_OF_PYTHON void PyErr_SetString(PyObject* type, const char* message);
SGLK_OF_PYTHON PyThreadState* PyEval_SaveThread();
SGLK_OF_PYTHON void PyEval_RestoreThread(PyThreadState* state);
SGLK_OF_PYTHON void Py_IncRef(PyObject* object);
SGLK_OF_PYTHON extern PyObject* PyExc_RuntimeError;
SGLK_OF_PYTHON extern PyObject _Py_NoneStruct;
#undef SGLK_OF_PYTHON
}

namespace sgl_kernel {
namespace {

constexpr int kOneArgument = 0x0008;  // METH_O

// The generation into a staging set and the copy out of it on one stream, and neither where one is refused.
void enqueue_both(const GenerateRun& generate, const CopyRun& copy) {
  const int32_t device_index = generate.plan.header->device_index;
  if (copy.plan.header->device_index != device_index) {
    reject("metadata_replay", {"copy"}, "a plan of " + device_text(backend::device_type(), device_index),
           device_text(backend::device_type(), copy.plan.header->device_index));
  }
  const backend::Stream stream(device_index);
  generate.enqueue(stream);
  copy.enqueue(stream);
}

void enqueue(const PlanHeader* generate, const PlanHeader* copy, int64_t max_len) {
  if (generate != nullptr && copy != nullptr) {
    enqueue_both(open_generate_run(generate, max_len), open_copy_run(copy, -1, max_len));
  } else if (generate != nullptr) {
    open_generate_run(generate, max_len).enqueue(backend::Stream(generate->device_index));
  } else if (copy != nullptr) {
    open_copy_run(copy, -1, max_len).enqueue(backend::Stream(copy->device_index));
  }
}

// `self`: a tuple that begins with the addresses of a plan of nsa_metadata_generate and of one of fused_metadata_copy,
// 0 for one that is not wanted; what follows keeps them alive. `argument`: max_len.
PyObject* replay(PyObject* self, PyObject* argument) {
  const int64_t max_len = PyLong_AsLongLong(argument);
  if (max_len == -1 && PyErr_Occurred() != nullptr) return nullptr;
  const void* const generate = PyLong_AsVoidPtr(PyTuple_GetItem(self, 0));
  const void* const copy = PyLong_AsVoidPtr(PyTuple_GetItem(self, 1));
  std::string error;
  PyThreadState* const state = PyEval_SaveThread();  // a launch waits where the device's queue is full
  try {
    enqueue(static_cast<const PlanHeader*>(generate), static_cast<const PlanHeader*>(copy), max_len);
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  PyEval_RestoreThread(state);
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

PyMethodDef kReplay{"metadata_replay", replay, kOneArgument, "metadata_replay(max_len: int) -> None"};

}  // namespace

// () -> the address of the builtin's PyMethodDef.
void metadata_replay_method(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(static_cast<int64_t>(reinterpret_cast<uintptr_t>(&kReplay)));
}

}  // namespace sgl_kernel
