// VideoWriter: encodes one clip on a thread of its own, beside the device that makes its frames.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <thread>

#include "kernels/core/error.h"
#include "kernels/core/tensor.h"
#include "server/media/mp4_encoder.h"

namespace slalom {

// Owns the encoder thread, the encoder and a bounded queue of frames. Push, Finish and Abort never
// block and may be called from any thread; the callbacks run on the encoder thread.
class VideoWriter {
 public:
  struct Callbacks {
    // The next piece of the file. May throw Error (a full disk): encoding ends with it.
    std::function<void(std::span<const std::byte>)> on_bytes;
    // There is room in the queue again.
    std::function<void()> on_room;
    // The last call, once: after Finish when all is encoded (no error), or as soon as encoding has
    // failed. Not called after Abort.
    std::function<void(const std::optional<Error>&)> on_end;
  };

  // `max_queued` batches of frames may wait before has_room turns false.
  VideoWriter(const VideoFormat& format, int max_queued, Callbacks callbacks);
  // Abort, then joins the thread: at most one frame's encoding. Not to be called by a callback.
  ~VideoWriter();

  VideoWriter(const VideoWriter&) = delete;
  VideoWriter& operator=(const VideoWriter&) = delete;

  // Frames [n, height, width, 3] u8 RGB on the host, kept until they are encoded. Pushing more than
  // there is room for is allowed (the decoder was already at work); so is pushing after an error.
  void Push(Tensor frames);
  // No more frames will come.
  void Finish();
  // Forgets what is queued.
  void Abort();

  bool has_room() const;
  // Seconds of encoding so far.
  double encode_seconds() const;

 private:
  void Run();
  void EncodeAll();
  // The next batch; nothing at the end of the clip or when aborted.
  std::optional<Tensor> Next();

  const VideoFormat format_;
  const int max_queued_;
  const Callbacks callbacks_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Tensor> queue_;
  bool finished_ = false;
  bool aborted_ = false;
  double encode_seconds_ = 0;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace slalom
