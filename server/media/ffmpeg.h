// RAII and error handling for FFmpeg's C objects. Included by server/media/*.cc only.
#pragma once

#include <memory>
#include <string>

extern "C" {
#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/cpu.h>
#include <libavutil/opt.h>
#include <libswscale/swscale.h>
}

#include "kernels/core/error.h"

namespace slalom::ffmpeg {

// Throws Error(kInternal), or kResourceExhausted when memory ran out, if `result` is negative.
inline void Check(int result, const char* what) {
  if (result >= 0) return;
  char text[AV_ERROR_MAX_STRING_SIZE] = {};
  av_strerror(result, text, sizeof(text));
  throw Error(result == AVERROR(ENOMEM) ? ErrorCode::kResourceExhausted : ErrorCode::kInternal,
              std::string("video encoder: ") + what + ": " + text);
}

struct Deleter {
  void operator()(AVCodecContext* p) const { avcodec_free_context(&p); }
  void operator()(AVFormatContext* p) const { avformat_free_context(p); }
  void operator()(AVIOContext* p) const {
    av_freep(&p->buffer);
    avio_context_free(&p);
  }
  void operator()(AVPacket* p) const { av_packet_free(&p); }
  void operator()(AVFrame* p) const { av_frame_free(&p); }
  void operator()(SwsContext* p) const { sws_freeContext(p); }
};
using CodecContext = std::unique_ptr<AVCodecContext, Deleter>;
using Io = std::unique_ptr<AVIOContext, Deleter>;  // one with a buffer from av_malloc
using Muxer = std::unique_ptr<AVFormatContext, Deleter>;
using Packet = std::unique_ptr<AVPacket, Deleter>;
using Frame = std::unique_ptr<AVFrame, Deleter>;
using Scaler = std::unique_ptr<SwsContext, Deleter>;

class Dictionary {
 public:
  Dictionary() = default;
  ~Dictionary() { av_dict_free(&dictionary_); }
  Dictionary(const Dictionary&) = delete;
  Dictionary& operator=(const Dictionary&) = delete;

  void Set(const char* key, const std::string& value) {
    Check(av_dict_set(&dictionary_, key, value.c_str(), 0), key);
  }
  AVDictionary** get() { return &dictionary_; }

 private:
  AVDictionary* dictionary_ = nullptr;
};

}  // namespace slalom::ffmpeg
