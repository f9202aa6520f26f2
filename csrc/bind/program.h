// A recorded sequence of kernel calls with fixed addresses: what a CUDA graph is on a GPU.
#pragma once
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace fastdiff {

class Program {
 public:
  // The program that calls on this thread are added to, or null.
  static Program*& recording() {
    static thread_local Program* program = nullptr;
    return program;
  }

  // `file` is the binding's source: what a profile calls the task.
  void add(int64_t cost, const char* file, std::function<void()> work) { tasks_.push_back({cost, file, std::move(work)}); }
  size_t size() const { return tasks_.size(); }

  struct Task {
    int64_t cost;
    const char* file;
    std::function<void()> work;
  };
  const std::vector<Task>& tasks() const { return tasks_; }

  // Runs tasks from `first` on until they cost more than `limit`; returns the first one that was not run.
  size_t run(size_t first, int64_t limit) const {
    for (int64_t cost = 0; first < tasks_.size() && cost <= limit; ++first) {
      tasks_[first].work();
      cost += tasks_[first].cost;
    }
    return first;
  }

 private:
  std::vector<Task> tasks_;
};

}  // namespace fastdiff
