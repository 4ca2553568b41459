// Ordering a backend's work against a stream that somebody else owns.
#pragma once

#include "kernels/backend.h"

namespace slalom {

// `stream` is a cudaStream_t of the backend's device (null: its default stream); a CPU backend
// ignores it, its work is done when a call returns. Neither function waits for the device; both
// throw Error(kUnavailable) when it is lost.

// What is queued on the backend from here on runs after what the stream holds now.
void FollowStream(Backend& backend, void* stream);
// What is queued on the stream from here on runs after what the backend holds now.
void LeadStream(Backend& backend, void* stream);

}  // namespace slalom
