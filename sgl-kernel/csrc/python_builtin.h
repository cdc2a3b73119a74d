// What a builtin function of Python needs: an operator boxes, dispatches and unboxes its arguments, which beside a GPU
// takes the host 2 to 3 us, as long as the launch itself, and 20 us where other work has pushed that much code out of
// its caches.
//
// Made without Python's headers, which a machine that builds this need not have: what is used is of Python's stable
// ABI, and found in the process that loads the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

extern "C" {
struct PyObject;
struct PyThreadState;
struct PyMethodDef {
  const char* name;
  void* function;
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

constexpr int kOneArgument = 0x0008;    // METH_O: function(self, argument)
constexpr int kManyArguments = 0x0080;  // METH_FASTCALL: function(self, arguments, count)

// An address that a builtin's `self`, a tuple, holds.
template <typename T>
const T* held_address(PyObject* self, std::ptrdiff_t index) {
  return static_cast<const T*>(PyLong_AsVoidPtr(PyTuple_GetItem(self, index)));
}

// False where Python has an error set.
inline bool take_integer(PyObject* number, int64_t& value) {
  value = PyLong_AsLongLong(number);
  return value != -1 || PyErr_Occurred() == nullptr;
}

inline PyObject* fail(const std::string& error) {
  PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return nullptr;
}

// None, or an exception as a RuntimeError. The lock is Python's: a launch waits where the device's queue is full.
template <typename Work>
PyObject* run_without_lock(const Work& work) {
  std::string error;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    work();
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  PyEval_RestoreThread(state);
  if (!error.empty()) return fail(error);
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

}  // namespace sgl_kernel
